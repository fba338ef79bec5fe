"""One request on a decode worker, from the reservation of its blocks until nothing of it is left here.

1. RESERVED: accepted; blocks for the whole prompt are reserved and the KV of the prompt may be written into them.
2. RUNNING: every frame has landed and was verified; the request is in the decode batch and produces tokens.
3. STOPPING: its fate is sealed before it landed; the transfer is being stopped, because blocks that it may still write
   cannot be freed.
4. FREEING: nothing writes the blocks; the engine was told to free them. What a running step still says of the request
   comes before its answer, so a later request of the same id never meets an output of this one.
5. CLOSED: the blocks are free, and only now the gateway learns of a failure: whoever hears it may send the id again.

The good way is RESERVED, RUNNING, CLOSED: the engine frees a finished request itself. The shell owns no decision: it
feeds events, performs the effects in their order, and arms one timer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from core.errors import InvalidTransition, ServingError, TransferError
from core.ids import RequestId, TransferId
from core.request import GenerateRequest, RequestOutput


class DecodeState(StrEnum):
    RESERVED = "reserved"
    RUNNING = "running"
    STOPPING = "stopping"
    FREEING = "freeing"
    CLOSED = "closed"


# Events: what happened.


@dataclass(frozen=True, slots=True)
class KvLanded:
    """All KV of the prompt is in our blocks. `exposed_s`: prefill end to landed; bytes and tokens that crossed."""

    first_token_id: int
    exposed_s: float
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The transfer ended without landing. Nothing of it writes our blocks any more."""

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
    KvLanded
    | TransferFailed
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

EDGES: Mapping[DecodeState, Mapping[type[Event], DecodeState]] = {
    DecodeState.RESERVED: {
        KvLanded: DecodeState.RUNNING,  # the receiver verified the last frame
        TransferFailed: DecodeState.FREEING,  # the prefill worker died or gave up, a frame was bad, no offer came
        AbortRequested: DecodeState.STOPPING,  # also when the first token was the last
        GatewayLost: DecodeState.STOPPING,
        DeadlinePassed: DecodeState.STOPPING,  # the backstop behind the transfer's own leases
        EngineFailed: DecodeState.STOPPING,  # the engine lost its pool
        WorkerClosed: DecodeState.STOPPING,
    },
    DecodeState.RUNNING: {
        TokensProduced: DecodeState.RUNNING,
        StreamFinished: DecodeState.CLOSED,
        EngineFailed: DecodeState.FREEING,
        AbortRequested: DecodeState.FREEING,
        GatewayLost: DecodeState.FREEING,
        WorkerClosed: DecodeState.FREEING,
    },
    DecodeState.STOPPING: {
        TransferStopped: DecodeState.FREEING,
        KvLanded: DecodeState.STOPPING,  # crossed with our stop, whose own answer is on its way
        TransferFailed: DecodeState.STOPPING,
        EngineFailed: DecodeState.STOPPING,
        AbortRequested: DecodeState.STOPPING,  # its fate is sealed already
        GatewayLost: DecodeState.STOPPING,
        WorkerClosed: DecodeState.STOPPING,
    },
    DecodeState.FREEING: {
        BlocksFreed: DecodeState.CLOSED,
        KvLanded: DecodeState.FREEING,
        TransferFailed: DecodeState.FREEING,
        TransferStopped: DecodeState.FREEING,
        TokensProduced: DecodeState.FREEING,  # the step that was running when we gave up
        StreamFinished: DecodeState.FREEING,
        EngineFailed: DecodeState.FREEING,
        AbortRequested: DecodeState.FREEING,
        GatewayLost: DecodeState.FREEING,
        WorkerClosed: DecodeState.FREEING,
    },
    DecodeState.CLOSED: {},
}


# Effects: what the shell is to do. `cause` names the event that led to it.


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


Effect = ActivateInEngine | StopTransfer | AbortInEngine | SendLanded | SendOutput | SendFailed


class DecodeRequest:
    """The machine of one request.

    Args:
        held_tokens: prompt tokens whose KV was in our prefix cache at the reservation.
        landing_timeout_s: from acceptance to the last frame.
    """

    def __init__(
        self,
        request: GenerateRequest,
        transfer_id: TransferId,
        held_tokens: int,
        *,
        now: float,
        landing_timeout_s: float,
    ) -> None:
        self.request = request
        self.transfer_id = transfer_id
        self.held_tokens = held_tokens
        self.state = DecodeState.RESERVED
        self._deadline: float | None = now + landing_timeout_s
        self._landed: KvLanded | None = None  # until the gateway was told
        self._landed_at = 0.0
        self._end: SendFailed | None = None

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    def next_deadline(self) -> float | None:
        """When `DeadlinePassed` is due. Stopping a transfer is bounded by the transfer service, freeing by a step."""
        return self._deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; return what to do about it, in order.

        Raises:
            InvalidTransition: there is no edge; nothing changed.
        """
        before = self.state
        after = EDGES[before].get(type(event))
        if after is None:
            raise InvalidTransition("decode request", before, event)
        if after is before and after is not DecodeState.RUNNING:
            return []
        self.state = after
        self._deadline = None
        cause = type(event).__name__
        effects: list[Effect] = []
        match event:
            case KvLanded():
                self._landed, self._landed_at = event, now
                effects.append(ActivateInEngine(self.request_id, event.first_token_id, cause))
            case TokensProduced(output) | StreamFinished(output):
                effects.extend(self._tell_landed(now, cause))
                effects.append(SendOutput(output, cause))
            case TransferFailed(reason, detail):
                self._end = SendFailed(self.request_id, TransferError(reason, detail), cause)
            case EngineFailed(error) | WorkerClosed(error):
                self._end = SendFailed(self.request_id, error, cause)
            case DeadlinePassed():
                late = TransferError("lease_expired", "the KV did not land in time")
                self._end = SendFailed(self.request_id, late, cause)
            case AbortRequested() | GatewayLost() | TransferStopped() | BlocksFreed():
                pass  # nobody to tell, or told at the end
        match after:
            case DecodeState.STOPPING:
                effects.append(StopTransfer(self.request_id, self.transfer_id, cause, cause))
            case DecodeState.FREEING:
                effects.append(AbortInEngine(self.request_id, cause))
            case DecodeState.CLOSED if self._end is not None:
                effects.append(self._end)
        return effects

    def check(self) -> None:
        """Assert what must hold between events."""
        assert (self._deadline is not None) == (self.state is DecodeState.RESERVED)
        assert not (self.state is DecodeState.RESERVED and self._landed is not None)
        assert not (self.state in (DecodeState.RESERVED, DecodeState.RUNNING) and self._end is not None)

    def _tell_landed(self, now: float, cause: str) -> list[Effect]:
        landed, self._landed = self._landed, None
        if landed is None:
            return []
        sent = self.request.num_prompt_tokens - self.held_tokens
        first_decode_s = now - self._landed_at
        return [
            SendLanded(
                self.request_id, landed.exposed_s, first_decode_s, self.held_tokens, sent, landed.kv_bytes, cause
            )
        ]
