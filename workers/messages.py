"""What happens to a request on either kind of worker (events), what its machine asks for (effects), and reports.

A role adds its own: `prefill_workers.messages`, `decode_workers.messages`. Events are in the past tense, effects in the
imperative; `cause` names the event that led to an effect.
"""

from dataclasses import dataclass

from core.errors import RejectedError, ServingError
from core.ids import RequestId, TransferId
from core.membership import LoadReport
from core.request import RequestOutput

# Events: what happened.


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The request got into the engine's batch; `cached_tokens` of its prompt need no computing."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class FirstTokenComputed:
    """The engine computed the prompt and sampled the first token, and the stream goes on."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class LastTokenComputed:
    """The first token is also the last: end of sequence, a stop, or max_tokens = 1."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class TokensProduced:
    """A step produced tokens after the first one, and the stream goes on."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """A step ended the stream well, after the first token; the engine has freed the request."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine refused the request after we had accepted it, or lost it in a failed step."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The transfer ended without success. Nothing of it reads or writes our blocks any more."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class TransferStopped:
    """We stopped the transfer. Nothing of it reads or writes our blocks any more."""


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


SharedEvent = (
    Scheduled
    | FirstTokenComputed
    | LastTokenComputed
    | TokensProduced
    | StreamFinished
    | EngineFailed
    | TransferFailed
    | TransferStopped
    | BlocksFreed
    | AbortRequested
    | GatewayLost
    | DeadlinePassed
    | WorkerClosed
)


def news_of(output: RequestOutput) -> FirstTokenComputed | LastTokenComputed | TokensProduced | StreamFinished:
    """Return the event that an output of the engine is. Pure."""
    is_first = bool(output.tokens) and output.tokens[0].index == 0
    if output.finish is not None:
        return LastTokenComputed(output) if is_first else StreamFinished(output)
    return FirstTokenComputed(output) if is_first else TokensProduced(output)


# Effects: what the desk is to do.


@dataclass(frozen=True, slots=True)
class SendAccepted:
    """To the gateway: the request is ours. `held_tokens`: of its prompt, that need not be sent here."""

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
class SendOutput:
    """To the gateway: tokens, and the end if it came."""

    output: RequestOutput
    cause: str


@dataclass(frozen=True, slots=True)
class SendComputed:
    """To the gateway: how computing the prompt went. Before the first token: after it the gateway may be done with this
    worker at any moment, when that was the last or another worker says that it has the KV."""

    request_id: RequestId
    queue_s: float
    compute_s: float
    cached_tokens: int
    cause: str


@dataclass(frozen=True, slots=True)
class SendFailed:
    """To the gateway: lost here."""

    request_id: RequestId
    error: ServingError
    cause: str


@dataclass(frozen=True, slots=True)
class StopTransfer:
    """End the transfer, if there is one, and report `TransferStopped` when nothing of it touches our blocks."""

    request_id: RequestId
    transfer_id: TransferId | None
    reason: str
    cause: str


@dataclass(frozen=True, slots=True)
class AbortInEngine:
    """The engine drops the request, whatever its state there; report `BlocksFreed`."""

    request_id: RequestId
    cause: str


SharedEffect = SendAccepted | SendRejected | SendOutput | SendComputed | SendFailed | StopTransfer | AbortInEngine


# Beside the machine: what the shell itself tells a gateway.


@dataclass(frozen=True, slots=True)
class SendAnswer:
    """The answer to a submission, with the load that it was given under."""

    answer: SendAccepted | SendRejected
    load: LoadReport


@dataclass(frozen=True, slots=True)
class SendOutputs:
    """All that one engine step produced for this gateway."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class SendLoad:
    load: LoadReport


SharedReport = SendAnswer | SendOutputs | SendComputed | SendLoad | SendFailed
