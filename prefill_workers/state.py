"""One request on a prefill worker, from acceptance until nothing of it is left here.

1. COMPUTING: accepted. The decode worker is offered the KV, then the engine is given the prompt.
2. SENDING: the first token left for the gateway; the blocks are under a lease until the decode worker has their KV.
3. STOPPING: its fate is sealed; the transfer is being stopped, because blocks that it may still read cannot be freed.
4. FREEING: nothing reads the blocks; the engine was told to free them. What a running step still says of the request
   comes before its answer, so a later request of the same id never meets an output of this one.
5. CLOSED: the blocks are free, and only now the gateway learns of the end: whoever hears it may send the id again.

A request without hand-off (its first token is its last) takes the same way: for it the shell reports `TransferStopped`
at once. The shell owns no decision: it feeds events, performs the effects in their order, and arms one timer.
"""

from collections.abc import Mapping
from enum import StrEnum

from core.errors import InvalidTransition, TransferError
from core.ids import RequestId, TransferId
from core.request import GenerateRequest
from prefill_workers.messages import (
    CommitTransfer,
    Effect,
    Event,
    FirstTokenComputed,
    HandOff,
    LastTokenComputed,
    ReleaseBlocks,
    Scheduled,
    SendComputed,
    SendHandedOver,
    TransferAcked,
)
from workers.messages import (
    AbortInEngine,
    AbortRequested,
    BlocksFreed,
    DeadlinePassed,
    EngineFailed,
    GatewayLost,
    SendFailed,
    SendOutput,
    StopTransfer,
    TransferFailed,
    TransferStopped,
    WorkerClosed,
)


class PrefillState(StrEnum):
    COMPUTING = "computing"
    SENDING = "sending"
    STOPPING = "stopping"
    FREEING = "freeing"
    CLOSED = "closed"


EDGES: Mapping[PrefillState, Mapping[type[Event], PrefillState]] = {
    PrefillState.COMPUTING: {
        Scheduled: PrefillState.COMPUTING,  # a step began that computes some of it
        FirstTokenComputed: PrefillState.SENDING,  # the engine's step ended
        LastTokenComputed: PrefillState.STOPPING,  # the decode worker is not needed; its reservation is the gateway's
        EngineFailed: PrefillState.STOPPING,  # late refusal, or a failed step
        TransferFailed: PrefillState.FREEING,  # the decode worker died or refused while we computed
        AbortRequested: PrefillState.STOPPING,
        GatewayLost: PrefillState.STOPPING,
        DeadlinePassed: PrefillState.STOPPING,  # the engine is hopelessly behind
        WorkerClosed: PrefillState.STOPPING,
    },
    PrefillState.SENDING: {
        TransferAcked: PrefillState.FREEING,  # the only good end of a hand-off
        TransferFailed: PrefillState.FREEING,
        EngineFailed: PrefillState.STOPPING,  # the engine lost its pool
        AbortRequested: PrefillState.STOPPING,
        GatewayLost: PrefillState.STOPPING,
        DeadlinePassed: PrefillState.STOPPING,  # the lease is over
        WorkerClosed: PrefillState.STOPPING,
    },
    PrefillState.STOPPING: {
        TransferStopped: PrefillState.FREEING,
        TransferAcked: PrefillState.STOPPING,  # crossed with our stop, whose own answer is on its way
        TransferFailed: PrefillState.STOPPING,
        Scheduled: PrefillState.STOPPING,  # all of these: the step that was running when we gave up
        FirstTokenComputed: PrefillState.STOPPING,
        LastTokenComputed: PrefillState.STOPPING,
        EngineFailed: PrefillState.STOPPING,
        AbortRequested: PrefillState.STOPPING,  # its fate is sealed already
        GatewayLost: PrefillState.STOPPING,
        WorkerClosed: PrefillState.STOPPING,
    },
    PrefillState.FREEING: {
        BlocksFreed: PrefillState.CLOSED,
        TransferStopped: PrefillState.FREEING,
        TransferAcked: PrefillState.FREEING,
        TransferFailed: PrefillState.FREEING,
        Scheduled: PrefillState.FREEING,  # as above
        FirstTokenComputed: PrefillState.FREEING,
        LastTokenComputed: PrefillState.FREEING,
        EngineFailed: PrefillState.FREEING,
        AbortRequested: PrefillState.FREEING,
        GatewayLost: PrefillState.FREEING,
        WorkerClosed: PrefillState.FREEING,
    },
    PrefillState.CLOSED: {},
}


class PrefillRequest:
    """The machine of one request.

    Args:
        hand_off: None when the first token is the last by the gateway's own word.
        compute_timeout_s: from acceptance to the first token.
        send_timeout_s: from the first token to the ACK.
    """

    def __init__(
        self,
        request: GenerateRequest,
        hand_off: HandOff | None,
        *,
        now: float,
        compute_timeout_s: float,
        send_timeout_s: float,
    ) -> None:
        self.request = request
        self.hand_off = hand_off
        self.accepted_at = now
        self.state = PrefillState.COMPUTING
        self.ended_by = ""  # the event that sealed its fate
        self._scheduled_at = now
        self._cached_tokens = 0
        self._is_computed = False
        self._end: SendHandedOver | SendFailed | None = None
        self._send_timeout_s = send_timeout_s
        self._deadline: float | None = now + compute_timeout_s

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def transfer_id(self) -> TransferId | None:
        return self.hand_off.transfer_id if self.hand_off else None

    @property
    def is_closed(self) -> bool:
        return self.state is PrefillState.CLOSED

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
            raise InvalidTransition("prefill request", before, event)
        if after is before:
            if isinstance(event, Scheduled) and after is PrefillState.COMPUTING:
                self._scheduled_at, self._cached_tokens = now, event.cached_tokens
            return []
        self.state = after
        self._deadline = now + self._send_timeout_s if after is PrefillState.SENDING else None
        cause = type(event).__name__
        if before in (PrefillState.COMPUTING, PrefillState.SENDING):
            self.ended_by = cause
        effects: list[Effect] = []
        match event:
            case FirstTokenComputed() | LastTokenComputed():
                self._is_computed = True
                effects.append(SendOutput(event.output, cause))
                queue_s = self._scheduled_at - self.accepted_at
                compute_s = now - self._scheduled_at
                effects.append(SendComputed(self.request_id, queue_s, compute_s, self._cached_tokens, cause))
            case TransferAcked():
                self._end = SendHandedOver(self.request_id, cause)
            case TransferFailed(reason, detail):
                self._end = SendFailed(self.request_id, TransferError(reason, detail), cause)
            case EngineFailed(error) | WorkerClosed(error):
                self._end = SendFailed(self.request_id, error, cause)
            case DeadlinePassed():
                late = TransferError("lease_expired", f"the prefill worker gave up {before}")
                self._end = SendFailed(self.request_id, late, cause)
            case AbortRequested() | GatewayLost() | TransferStopped() | BlocksFreed() | Scheduled():
                pass  # nobody to tell, or told already
        match after:
            case PrefillState.SENDING:
                assert isinstance(event, FirstTokenComputed)
                assert self.hand_off is not None, "without hand-off the first token is the last"
                first_token_id = event.output.tokens[0].token_id
                effects.append(CommitTransfer(self.hand_off.transfer_id, first_token_id, cause))
            case PrefillState.STOPPING:
                effects.append(StopTransfer(self.request_id, self.transfer_id, cause, cause))
            case PrefillState.FREEING:
                free = ReleaseBlocks if self._is_computed else AbortInEngine
                effects.append(free(self.request_id, cause))
            case PrefillState.CLOSED if self._end is not None:
                effects.append(self._end)
        return effects

    def check(self) -> None:
        """Assert what must hold between events."""
        assert (self._deadline is not None) == (self.state in (PrefillState.COMPUTING, PrefillState.SENDING))
        assert not (self.state is PrefillState.COMPUTING and self._is_computed)
        assert not (self.state is PrefillState.SENDING and not self._is_computed)
        assert not (self.state in (PrefillState.COMPUTING, PrefillState.SENDING) and self._end is not None)
