"""Configuration of one prefill worker."""

from pydantic import Field

from workers.config import WorkerConfig


class PrefillWorkerConfig(WorkerConfig):
    """What every worker has, and what this one takes on."""

    max_queued_tokens: int = Field(
        262_144,
        ge=1,
        description="prompt tokens accepted and not computed; more is refused. A few prompts' worth at least: workers "
        "that refuse early make the router ask around, and prompts miss the worker that has their prefix",
    )
    compute_timeout_s: float = Field(300.0, gt=0, description="acceptance to first token, else the request fails")
    bind_timeout_s: float = Field(
        30.0, gt=0, description="first token to the gateway's word where it goes on, of a request that is bound late"
    )
    send_timeout_s: float = Field(
        60.0, gt=0, description="first token, or the bind, to the decode worker's ACK: the blocks' lease"
    )
