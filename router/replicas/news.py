"""What one gateway tells the others, as core types. Absolute values: the newest message about a thing replaces all
that the same gateway said of it before."""

from dataclasses import dataclass

from core.ids import Epoch, GatewayId, WorkerId
from core.membership import LoadReport


@dataclass(frozen=True, slots=True)
class CreditNews:
    """Work that a gateway sent to one incarnation of a worker and that no load report can include yet.

    Attributes:
        load: the newest that the worker told this gateway, maybe only this one, with an answer.
    """

    worker_id: WorkerId
    epoch: Epoch
    num_requests: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    prefill_s: float = 0.0
    load: LoadReport | None = None

    @property
    def is_nothing(self) -> bool:
        return not (self.num_requests or self.prefill_tokens or self.context_tokens or self.prefill_s)

    def plus(self, other: "CreditNews") -> "CreditNews":
        """Return the sum, for this one's worker and epoch, without a load."""
        return CreditNews(
            self.worker_id,
            self.epoch,
            self.num_requests + other.num_requests,
            self.prefill_tokens + other.prefill_tokens,
            self.context_tokens + other.context_tokens,
            self.prefill_s + other.prefill_s,
        )


@dataclass(frozen=True, slots=True)
class BindingNews:
    """Where a session's requests went last. None: that role was not needed."""

    session_id: str
    prefill: WorkerId | None
    decode: WorkerId | None
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class BreakerNews:
    """State of the circuit breaker before one incarnation of a worker."""

    worker_id: WorkerId
    epoch: Epoch
    state: str
    open_for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AbortAsk:
    """Whether anybody has this tenant's request, and may it be aborted."""

    ask_id: str
    request_id: str
    tenant: str


@dataclass(frozen=True, slots=True)
class AbortAnswer:
    """Whether a gateway had it."""

    ask_id: str
    found: bool


@dataclass(frozen=True, slots=True)
class News:
    """One message.

    Attributes:
        sequence: consecutive from 1 for each gateway.
        is_whole: credits and breakers are all that there are; what is absent is nothing.
        is_leaving: the gateway stops; nothing that it said holds any more.
    """

    gateway_id: GatewayId
    sequence: int
    is_whole: bool = False
    credits: tuple[CreditNews, ...] = ()
    bindings: tuple[BindingNews, ...] = ()
    breakers: tuple[BreakerNews, ...] = ()
    is_leaving: bool = False
    aborts_asked: tuple[AbortAsk, ...] = ()
    aborts_answered: tuple[AbortAnswer, ...] = ()
