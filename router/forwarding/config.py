"""Configuration of the forwarding of requests to workers."""

from pydantic import Field

from core.config import ConfigModel


class BreakerConfig(ConfigModel):
    """When a worker that fails is left alone, and for how long."""

    failures: int = Field(3, ge=1, description="works in a row that a worker loses before it is left alone")
    open_min_s: float = Field(0.5, gt=0, description="first rest; doubles with every further failure, with jitter")
    open_max_s: float = Field(30.0, gt=0)


class AffinityConfig(ConfigModel):
    """How long the requests of one session are drawn to the same workers."""

    ttl_s: float = Field(600.0, gt=0, description="after the last request of the session")
    max_sessions: int = Field(100_000, ge=1, description="the least recently used is forgotten first")


class ForwardingConfig(ConfigModel):
    """What goes to workers, and to which of them."""

    breaker: BreakerConfig = BreakerConfig()
    affinity: AffinityConfig = AffinityConfig()
    max_late_bound: int = Field(
        64,
        ge=0,
        description="prompts computed at once that still lack a decode worker; more wait in the queue",
    )
    max_refusals: int = Field(
        16,
        ge=1,
        description="workers that refuse a request, or are lost, before it goes back to its place in the queue, "
        "however many others there are: they were the likeliest to have room",
    )
    predicted_ttl_s: float = Field(
        10.0, gt=0, description="a prompt that was sent counts so long as what the worker's prefix cache will hold"
    )
