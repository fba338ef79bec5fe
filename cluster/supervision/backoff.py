"""How long to wait before a failed service is started again. Pure."""

from pydantic import Field, model_validator

from core.config import ConfigModel


class BackOffConfig(ConfigModel):
    """Exponential, with jitter so that workers felled by one cause do not come back in one wave."""

    base_s: float = Field(0.25, gt=0, le=60, description="before the first restart")
    factor: float = Field(2.0, ge=1, le=10, description="growth per failure in a row")
    max_s: float = Field(30.0, gt=0, le=3600)
    jitter_ratio: float = Field(0.5, ge=0, le=1, description="share of the delay that is random")
    stable_s: float = Field(30.0, gt=0, description="a service that was ready this long starts from base_s again")
    crash_loop_failures: int = Field(5, ge=1, description="failures in a row that are called a crash loop")

    @model_validator(mode="after")
    def _ordered(self) -> "BackOffConfig":
        if self.max_s < self.base_s:
            raise ValueError("max_s must not be below base_s")
        return self


def restart_delay_s(config: BackOffConfig, failures: int, unit_random: float) -> float:
    """Return the wait before the next start.

    Args:
        failures: in a row, the latest included; >= 1.
        unit_random: uniform in [0, 1).
    """
    grown = config.base_s * config.factor ** min(failures - 1, 64)  # a bound, so that the power cannot overflow
    full = min(config.max_s, grown)
    return full * (1.0 - config.jitter_ratio * unit_random)
