"""Configuration of admission: what the classes promise, and how those who wait are ordered."""

from enum import StrEnum

from pydantic import Field

from core.config import ConfigModel
from core.service_class import ServiceClass, Slo


class DoorMode(StrEnum):
    """What is done about a request whose targets would be missed by all that is known."""

    ENFORCE = "enforce"  # refuse it now
    OBSERVE = "observe"  # let it in, and count it
    OFF = "off"  # do not ask


class ClassConfig(ConfigModel):
    """One service class. The targets hold for requests that bring none of their own."""

    ttft_s: float | None = Field(None, gt=0, description="arrival to first token; absent: no target")
    tpot_s: float | None = Field(None, gt=0, description="mean gap between later tokens; absent: no target")
    deadline_s: float | None = Field(None, gt=0, description="arrival to last token; absent: no target")
    door: DoorMode = DoorMode.ENFORCE
    tolerance_ratio: float = Field(
        0.1, ge=0, description="a prediction may exceed its target by this part before it counts as a miss"
    )

    @property
    def slo(self) -> Slo:
        return Slo(self.ttft_s, self.tpot_s, self.deadline_s)


class OutputLengthsConfig(ConfigModel):
    """The history that output lengths are predicted from."""

    window: int = Field(256, ge=8, description="latest finished requests that one history keeps")
    min_samples: int = Field(16, ge=1, description="a history with fewer that apply leaves the answer to a wider one")
    max_histories: int = Field(1024, ge=8, description="kept at once; the longest unused goes first")
    forget_after_s: float = Field(3600.0, gt=0, description="older ones say nothing about today's traffic")


class AdmissionConfig(ConfigModel):
    """Order in the gateway's queue, and its door."""

    interactive: ClassConfig = ClassConfig()
    deadline: ClassConfig = ClassConfig()
    batch: ClassConfig = ClassConfig()
    aging_s: float = Field(
        10.0, gt=0, description="waiting so long is worth one class, or one level of a tenant's own priorities"
    )
    max_slack_s: float = Field(
        120.0, ge=0, description="a tenant's earlier deadlines go first by at most this; batch is due after this"
    )
    reserved_ratio: float = Field(
        0.05, ge=0, le=0.3, description="part of every bound of the queue that is kept for each class"
    )
    output_token_weight: float = Field(2.0, ge=0, description="of a generated token; a prompt token costs 1")
    rate_window_s: float = Field(10.0, gt=0, description="over which the queue's speed is measured")
    max_retry_after_s: float = Field(60.0, gt=0, description="longest hint that a refusal gives")
    output_lengths: OutputLengthsConfig = OutputLengthsConfig()

    def of(self, service_class: ServiceClass) -> ClassConfig:
        match service_class:
            case ServiceClass.INTERACTIVE:
                return self.interactive
            case ServiceClass.DEADLINE:
                return self.deadline
            case ServiceClass.BATCH:
                return self.batch
