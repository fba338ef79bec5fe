"""What only a prefill worker's request meets: its events, effects and reports, beside those of `workers.messages`."""

from dataclasses import dataclass

from core.ids import Epoch, RequestId, TransferId, WorkerId
from workers.messages import SharedEffect, SharedEvent, SharedReport


@dataclass(frozen=True, slots=True)
class Destination:
    """The decode worker that goes on with a request: which incarnation, and where its KvTransfer service listens."""

    worker_id: WorkerId
    epoch: Epoch
    address: str


@dataclass(frozen=True, slots=True)
class HandOff:
    """Where the KV goes, and what is asked of its transfer.

    Attributes:
        to: None: to be named later.
        quality_floor: of the compression profile (`core.kv_quality`); None: the worker's default.
        budget_s: the KV may arrive so long after the first token; None: as soon as it can.
        cached_tokens: of the prompt, that the gateway believes to be in our prefix cache.
    """

    transfer_id: TransferId
    to: Destination | None
    quality_floor: float | None = None
    budget_s: float | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """The link to a decode worker, as it was measured; None: not yet. `queued_bytes` wait for it now."""

    goodput_bytes_per_s: float | None
    rtt_s: float | None
    queued_bytes: int


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Bound:
    """The gateway has named the decode worker, which has accepted."""

    to: Destination


@dataclass(frozen=True, slots=True)
class KeptHere:
    """The gateway wants no decode worker: this worker is to generate all of it."""


@dataclass(frozen=True, slots=True)
class TransferAcked:
    """The decode worker has every frame. Nothing of the transfer reads our blocks any more."""

    link: LinkFacts | None = None


OwnEvent = Bound | KeptHere | TransferAcked
Event = OwnEvent | SharedEvent

# Effects: what the shell is to do. `cause` names the event that led to it.


@dataclass(frozen=True, slots=True)
class OfferTransfer:
    """Offer the KV to this decode worker, and send what is ready of it."""

    to: Destination
    cause: str


@dataclass(frozen=True, slots=True)
class KeepInEngine:
    """Let the prefill go on here, whatever its state in the engine."""

    request_id: RequestId
    cause: str


@dataclass(frozen=True, slots=True)
class SendHandedOver:
    """To the gateway: the decode worker has it."""

    request_id: RequestId
    link: LinkFacts | None
    cause: str


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """All KV of the prompt is ready; the decode worker goes on after this token."""

    first_token_id: int
    cause: str


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """The prompt was computed: its blocks go from the lease to the prefix cache."""

    request_id: RequestId
    cause: str


OwnEffect = OfferTransfer | KeepInEngine | SendHandedOver | CommitTransfer | ReleaseBlocks
Effect = OwnEffect | SharedEffect
Report = SharedReport | SendHandedOver
