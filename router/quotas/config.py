"""Configuration of the counting of tenants' quotas; the quotas themselves are in the tenants' own configuration."""

from pydantic import Field

from core.config import ConfigModel


class QuotasConfig(ConfigModel):
    """How the gateways of a cluster count together."""

    deadline_s: float = Field(0.1, gt=0, description="of one question to the store; then this gateway counts alone")
    burst_s: float = Field(60.0, gt=0, description="a rate may be used up to this far ahead at once")
    slot_lease_s: float = Field(
        9.0,
        gt=0,
        description="what a killed gateway's requests held comes back after so long; renewed three times as often",
    )
    retry_interval_s: float = Field(1.0, gt=0, description="while the store is away it is asked again this often")
    busy_retry_after_s: float = Field(1.0, ge=0, description="hint to a tenant that has as many requests as it may")
    max_local_tenants: int = Field(4096, ge=1, description="tenants that this gateway keeps its own counts of")
