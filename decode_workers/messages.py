"""What may happen to a request (events, past tense), what its machine asks for (effects, imperative), and reports."""

from dataclasses import dataclass

from core.errors import RejectedError, ServingError
from core.ids import RequestId, TransferId
from core.membership import LoadReport
from core.request import RequestOutput

# Events: what happened.


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """The engine has blocks for the prompt; `held_tokens` of it are in its prefix cache."""

    held_tokens: int


@dataclass(frozen=True, slots=True)
class ReservationRefused:
    """The engine kept nothing of the request."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class KvLanded:
    """All KV of the prompt is in our blocks. `exposed_s`: prefill end to landed. `kv_bytes`: what crossed."""

    first_token_id: int
    exposed_s: float
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The transfer ended without landing. Nothing of it writes our blocks any more."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class TransferCancelled:
    """The prefill worker called the transfer off: the first token was the last, or it gave the request up.

    Nothing of it writes our blocks any more, and nothing failed here.
    """

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class TransferStopped:
    """We stopped the transfer. Nothing of it writes our blocks any more."""


@dataclass(frozen=True, slots=True)
class TokensProduced:
    """A step produced tokens and the stream goes on."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """A step ended the stream well; the engine has freed the request."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine refused to activate the request, or lost it in a failed step."""

    error: ServingError


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
    """The reservation is over."""


@dataclass(frozen=True, slots=True)
class WorkerClosed:
    """This worker gives the request up: it stops, or was fenced."""

    error: ServingError


Event = (
    BlocksReserved
    | ReservationRefused
    | KvLanded
    | TransferFailed
    | TransferCancelled
    | TransferStopped
    | TokensProduced
    | StreamFinished
    | EngineFailed
    | BlocksFreed
    | AbortRequested
    | GatewayLost
    | DeadlinePassed
    | WorkerClosed
)

# Effects: what the shell is to do. `cause` names the event that led to it.


@dataclass(frozen=True, slots=True)
class ExpectTransfer:
    """KV of this transfer may be written from now on, but for the held prefix."""

    request_id: RequestId
    transfer_id: TransferId
    held_tokens: int
    num_tokens: int
    lease_s: float
    cause: str


@dataclass(frozen=True, slots=True)
class SendAccepted:
    """To the gateway: blocks are reserved, so much of the prompt need not be sent."""

    request_id: RequestId
    held_tokens: int
    cause: str


@dataclass(frozen=True, slots=True)
class SendRejected:
    """To the gateway: nothing was kept; another worker may take it."""

    request_id: RequestId
    error: RejectedError
    cause: str


@dataclass(frozen=True, slots=True)
class ActivateInEngine:
    """The request joins the decode batch; it goes on after `first_token_id`."""

    request_id: RequestId
    first_token_id: int
    cause: str


@dataclass(frozen=True, slots=True)
class StopTransfer:
    """End the transfer and report `TransferStopped` when nothing of it writes our blocks."""

    request_id: RequestId
    transfer_id: TransferId
    reason: str
    cause: str


@dataclass(frozen=True, slots=True)
class AbortInEngine:
    """The engine drops the request, whatever its state there; report `BlocksFreed`."""

    request_id: RequestId
    cause: str


@dataclass(frozen=True, slots=True)
class SendLanded:
    """To the gateway, before this worker's first token: how the hand-off went."""

    request_id: RequestId
    exposed_s: float
    first_decode_s: float
    kv_tokens_held: int
    kv_tokens_sent: int
    kv_bytes: int
    cause: str


@dataclass(frozen=True, slots=True)
class SendOutput:
    """To the gateway: tokens, and the end if it came."""

    output: RequestOutput
    cause: str


@dataclass(frozen=True, slots=True)
class SendFailed:
    """To the gateway: lost here."""

    request_id: RequestId
    error: ServingError
    cause: str


Effect = (
    ExpectTransfer
    | ActivateInEngine
    | StopTransfer
    | AbortInEngine
    | SendAccepted
    | SendRejected
    | SendLanded
    | SendOutput
    | SendFailed
)


# Beside the machine: what the shell itself tells a gateway.


@dataclass(frozen=True, slots=True)
class SendOutputs:
    """All that one engine step produced for this gateway."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class SendLoad:
    load: LoadReport


Report = SendAccepted | SendRejected | SendOutputs | SendLoad | SendLanded | SendFailed
