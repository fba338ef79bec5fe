"""What only a prefill worker's request meets: its events, effects and reports, beside those of `workers.messages`."""

from dataclasses import dataclass

from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.request import RequestOutput
from workers.messages import SharedEffect, SharedEvent, SharedReport


@dataclass(frozen=True, slots=True)
class HandOff:
    """Where the KV goes, and what is asked of its transfer.

    Attributes:
        quality_floor: of the compression profile (`core.kv_quality`); None: the worker's default.
        budget_s: the KV may arrive so long after the first token; None: as soon as it can.
        cached_tokens: of the prompt, that the gateway believes to be in our prefix cache.
    """

    transfer_id: TransferId
    worker_id: WorkerId
    epoch: Epoch
    address: str
    quality_floor: float | None = None
    budget_s: float | None = None
    cached_tokens: int = 0


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The request got into the engine's batch; `cached_tokens` of its prompt need no computing."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class FirstTokenComputed:
    """The engine sampled the first token and the stream goes on."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class LastTokenComputed:
    """The first token is also the last: end of sequence, a stop, or max_tokens = 1."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class TransferAcked:
    """The decode worker has every frame. Nothing of the transfer reads our blocks any more."""


OwnEvent = Scheduled | FirstTokenComputed | LastTokenComputed | TransferAcked
Event = OwnEvent | SharedEvent

# Effects: what the shell is to do. `cause` names the event that led to it.


@dataclass(frozen=True, slots=True)
class SendComputed:
    """To the gateway: how the prefill went."""

    request_id: RequestId
    queue_s: float
    compute_s: float
    cached_tokens: int
    cause: str


@dataclass(frozen=True, slots=True)
class SendHandedOver:
    """To the gateway: the decode worker has it."""

    request_id: RequestId
    cause: str


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """All KV of the prompt was pushed; the decode worker goes on after this token."""

    transfer_id: TransferId
    first_token_id: int
    cause: str


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """The prompt was computed: its blocks go from the lease to the prefix cache."""

    request_id: RequestId
    cause: str


OwnEffect = SendComputed | SendHandedOver | CommitTransfer | ReleaseBlocks
Effect = OwnEffect | SharedEffect
Report = SharedReport | SendComputed | SendHandedOver
