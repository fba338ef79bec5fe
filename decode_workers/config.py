"""Configuration of one decode worker."""

from pydantic import Field

from workers.config import WorkerConfig


class DecodeWorkerConfig(WorkerConfig):
    """What every worker has, and how patient this one is."""

    compute_timeout_s: float = Field(
        300.0, gt=0, description="acceptance to first token of a prompt that is computed here, else the request fails"
    )
    landing_timeout_s: float = Field(
        360.0, gt=0, description="acceptance to the last frame: the backstop behind the leases of the transfer"
    )
