"""What became of each request of a simulated run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.ids import WorkerId
from core.service_class import NO_SLO, ServiceClass, Slo
from router.stream import Placement


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request of the traffic.

    Attributes:
        output_tokens: that the model will produce, which nobody knows before.
        max_tokens: that the client allows.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[bytes, ...] = ()
    max_tokens: int = 2048
    tenant: str = ""
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    slo: Slo = NO_SLO
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, all times relative to its arrival.

    Attributes:
        failure: reason of the refusal or kind of the error; empty when all tokens came.
        gaps: (seconds, how many such gaps) between its tokens, in order; the first holds the hand-off.
        num_asked: orders that its placement took, refused ones included.
    """

    request: SimulatedRequest
    failure: str = ""
    ttft_s: float | None = None
    total_s: float | None = None
    num_tokens: int = 0
    cached_tokens: int = 0
    gaps: tuple[tuple[float, int], ...] = ()
    placement: Placement | None = None
    num_asked: int = 0

    @property
    def is_served(self) -> bool:
        return not self.failure

    @property
    def tpot_s(self) -> float:
        """Mean gap after the first token, the hand-off included; 0 for one token."""
        if self.ttft_s is None or self.total_s is None or self.num_tokens < 2:
            return 0.0
        return (self.total_s - self.ttft_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadSample:
    """Load of the two pools at one moment: prompt tokens queued, sequences decoded."""

    at_s: float
    queued_tokens: tuple[int, ...]
    decoding: tuple[int, ...]
    context_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that one simulated run told."""

    outcomes: tuple[Outcome, ...]
    samples: tuple[LoadSample, ...]
    num_workers: int
    virtual_s: float
    busy_ratios: Mapping[WorkerId, float] = field(default_factory=dict)
    num_orders: int = 0

    def between(self, start_s: float, end_s: float) -> "Run":
        """Keep the requests that arrived in [start_s, end_s): warm-up and drain are no steady state."""
        kept = tuple(one for one in self.outcomes if start_s <= one.request.arrival_s < end_s)
        samples = tuple(sample for sample in self.samples if start_s <= sample.at_s < end_s)
        return Run(kept, samples, self.num_workers, end_s - start_s, self.busy_ratios, self.num_orders)
