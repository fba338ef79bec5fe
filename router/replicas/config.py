"""Configuration of what gateways tell each other."""

from pydantic import Field

from core.config import ConfigModel


class SharingConfig(ConfigModel):
    """How often, how much, and how long it is believed."""

    publish_interval_s: float = Field(0.01, gt=0, description="at least so long between two messages of one gateway")
    whole_interval_s: float = Field(1.0, gt=0, description="a message with everything comes so often, even when idle")
    silent_after_s: float = Field(3.0, gt=0, description="what a gateway said lapses when it is silent for so long")
    stream_entries: int = Field(1024, ge=16, description="messages kept for a gateway that starts")
    bindings_per_message: int = Field(256, ge=1, description="sessions told of at once")
    retry_interval_s: float = Field(0.25, gt=0, description="between two attempts while the store is away")
