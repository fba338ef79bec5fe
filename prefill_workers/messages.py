"""What may happen to a request (events, past tense), what its machine asks for (effects, imperative), and reports."""

from dataclasses import dataclass

from core.errors import RejectedError, ServingError
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import LoadReport
from core.request import RequestOutput


@dataclass(frozen=True, slots=True)
class HandOff:
    """Where the KV goes."""

    transfer_id: TransferId
    worker_id: WorkerId
    epoch: Epoch
    address: str


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
class EngineFailed:
    """The engine refused the request after we had accepted it, or lost it in a failed step."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class TransferAcked:
    """The decode worker has every frame. Nothing of the transfer reads our blocks any more."""


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The transfer ended without an ACK. Nothing of it reads our blocks any more."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class TransferStopped:
    """We stopped the transfer. Nothing of it reads our blocks any more."""


@dataclass(frozen=True, slots=True)
class BlocksFreed:
    """The engine holds nothing of the request, and all that it ever said of it has come."""


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """The gateway wants no more of it."""

    reason: str


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """The stream over which the request came has ended."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The state's deadline has come."""


@dataclass(frozen=True, slots=True)
class WorkerClosed:
    """This worker gives the request up: it stops, or was fenced."""

    error: ServingError


Event = (
    Scheduled
    | FirstTokenComputed
    | LastTokenComputed
    | EngineFailed
    | TransferAcked
    | TransferFailed
    | TransferStopped
    | BlocksFreed
    | AbortRequested
    | GatewayLost
    | DeadlinePassed
    | WorkerClosed
)

# Effects: what the shell is to do. `cause` names the event that led to it.


@dataclass(frozen=True, slots=True)
class SendOutput:
    """To the gateway: the first token."""

    output: RequestOutput
    cause: str


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
class SendFailed:
    """To the gateway: lost here."""

    request_id: RequestId
    error: ServingError
    cause: str


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """All KV of the prompt was pushed; the decode worker goes on after this token."""

    transfer_id: TransferId
    first_token_id: int
    cause: str


@dataclass(frozen=True, slots=True)
class StopTransfer:
    """End the transfer, if there is one, and report `TransferStopped` when nothing of it reads our blocks."""

    request_id: RequestId
    transfer_id: TransferId | None
    reason: str
    cause: str


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """The prompt was computed: its blocks go from the lease to the prefix cache."""

    request_id: RequestId
    cause: str


@dataclass(frozen=True, slots=True)
class AbortInEngine:
    """The prompt was not computed to its end, as far as we know: the engine drops it, whatever its state there."""

    request_id: RequestId
    cause: str


Effect = (
    SendOutput
    | SendComputed
    | SendHandedOver
    | SendFailed
    | CommitTransfer
    | StopTransfer
    | ReleaseBlocks
    | AbortInEngine
)


# Beside the machine: what the shell itself tells a gateway.


@dataclass(frozen=True, slots=True)
class SendAccepted:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class SendRejected:
    request_id: RequestId
    error: RejectedError


@dataclass(frozen=True, slots=True)
class SendOutputs:
    """All that one engine step produced for this gateway."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class SendLoad:
    load: LoadReport


Report = SendAccepted | SendRejected | SendOutputs | SendLoad | SendComputed | SendHandedOver | SendFailed
