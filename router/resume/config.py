"""Configuration of resumable streams."""

from pydantic import Field

from core.config import ConfigModel


class ResumeConfig(ConfigModel):
    """How long, how many, how large. The bounds are of one gateway."""

    max_window_s: float = Field(
        300.0, ge=0, description="longest window that a request may ask for; 0: no stream is resumable"
    )
    max_streams: int = Field(4096, ge=1, description="kept at once; ones that were read to the end make room")
    max_stream_bytes: int = Field(16 * 2**20, ge=1024, description="of the events kept of one stream")
    max_total_bytes: int = Field(256 * 2**20, ge=1024, description="of the events kept of all streams")
    max_mirror_bytes: int = Field(
        32 * 2**20, ge=1024, description="of all events in the shared store; further ones are kept here only"
    )
    mirror_interval_s: float = Field(
        0.02, gt=0, description="between two writes to the shared store, each with what all streams have to tell"
    )
    retry_interval_s: float = Field(0.25, gt=0, description="between two attempts while the store is away")
    store_patience_s: float = Field(
        5.0, gt=0, description="a reader of another gateway's stream waits so long for a store that is away"
    )
