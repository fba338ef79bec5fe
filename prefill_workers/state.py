"""One request on a prefill worker, from acceptance until nothing of it is left here.

Handed over to a decode worker:

1. COMPUTING: accepted. The decode worker is offered the KV, then the engine is given the prompt.
2. SENDING: the first token left for the gateway; the blocks are under a lease until the decode worker has their KV.
3. STOPPING: its fate is sealed; the transfer is being stopped, because blocks that it may still read cannot be freed.
4. FREEING: nothing reads the blocks; the engine was told to free them. What a running step still says of the request
   comes before its answer, so a later request of the same id never meets an output of this one.
5. CLOSED: the blocks are free, and only now the gateway learns of the end: whoever hears it may send the id again.

Bound late, the gateway chooses the decode worker while the prompt is computed, or after:

1. UNBOUND: accepted; the engine was given the prompt. Once bound it is COMPUTING.
2. LEASED: the first token left, and nobody is bound yet: the blocks wait. Once bound it is SENDING.

Without a decode worker, from the beginning or by the gateway's late word, it is GENERATING: the engine goes on to the
end and frees the request itself. The shell owns no decision: it feeds events, performs the effects in their order, and
arms one timer.
"""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

from core.errors import InvalidTransition, TransferError, WorkerLost
from core.ids import RequestId, TransferId
from core.request import GenerateRequest
from prefill_workers.messages import (
    Bound,
    CommitTransfer,
    Effect,
    Event,
    HandOff,
    KeepInEngine,
    KeptHere,
    OfferTransfer,
    ReleaseBlocks,
    SendHandedOver,
    TransferAcked,
)
from workers.messages import (
    AbortInEngine,
    AbortRequested,
    BlocksFreed,
    DeadlinePassed,
    EngineFailed,
    FirstTokenComputed,
    GatewayLost,
    LastTokenComputed,
    Scheduled,
    SendFailed,
    SendOutput,
    StopTransfer,
    StreamFinished,
    TokensProduced,
    TransferFailed,
    TransferStopped,
    WorkerClosed,
)
from workers.prompt_times import PromptTimes


class PrefillState(StrEnum):
    UNBOUND = "unbound"
    COMPUTING = "computing"
    LEASED = "leased"
    SENDING = "sending"
    GENERATING = "generating"
    STOPPING = "stopping"
    FREEING = "freeing"
    CLOSED = "closed"


_S = PrefillState
LIVING = frozenset({_S.UNBOUND, _S.COMPUTING, _S.LEASED, _S.SENDING, _S.GENERATING})
EDGES: Mapping[PrefillState, Mapping[type[Event], PrefillState]] = {
    _S.UNBOUND: {
        Scheduled: _S.UNBOUND,  # a step began that computes some of it
        Bound: _S.COMPUTING,
        KeptHere: _S.GENERATING,
        FirstTokenComputed: _S.LEASED,  # faster than the gateway's choice
        LastTokenComputed: _S.FREEING,  # there is nothing to choose any more; nothing was offered, so nothing stops
        EngineFailed: _S.FREEING,
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        DeadlinePassed: _S.FREEING,  # the engine is hopelessly behind
        WorkerClosed: _S.FREEING,
    },
    _S.COMPUTING: {
        Scheduled: _S.COMPUTING,
        FirstTokenComputed: _S.SENDING,  # the engine's step ended
        LastTokenComputed: _S.STOPPING,  # the decode worker is not needed; its reservation is the gateway's
        EngineFailed: _S.STOPPING,  # late refusal, or a failed step
        TransferFailed: _S.FREEING,  # the decode worker died or refused while we computed
        AbortRequested: _S.STOPPING,
        GatewayLost: _S.STOPPING,
        DeadlinePassed: _S.STOPPING,
        WorkerClosed: _S.STOPPING,
        Bound: _S.COMPUTING,  # said twice: the first word counts
        KeptHere: _S.COMPUTING,
    },
    _S.LEASED: {
        Bound: _S.SENDING,
        KeptHere: _S.GENERATING,
        EngineFailed: _S.FREEING,  # the engine lost its pool
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        DeadlinePassed: _S.FREEING,  # the gateway found nobody
        WorkerClosed: _S.FREEING,
    },
    _S.SENDING: {
        TransferAcked: _S.FREEING,  # the only good end of a hand-off
        TransferFailed: _S.FREEING,
        EngineFailed: _S.STOPPING,
        AbortRequested: _S.STOPPING,
        GatewayLost: _S.STOPPING,
        DeadlinePassed: _S.STOPPING,  # the lease is over
        WorkerClosed: _S.STOPPING,
        Bound: _S.SENDING,  # said twice
        KeptHere: _S.SENDING,
    },
    _S.GENERATING: {
        Scheduled: _S.GENERATING,
        FirstTokenComputed: _S.GENERATING,
        TokensProduced: _S.GENERATING,
        LastTokenComputed: _S.CLOSED,
        StreamFinished: _S.CLOSED,
        EngineFailed: _S.FREEING,
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        DeadlinePassed: _S.FREEING,  # before the first token: after it max_tokens is the bound
        WorkerClosed: _S.FREEING,
        Bound: _S.GENERATING,  # too late
        KeptHere: _S.GENERATING,
    },
    _S.STOPPING: {
        TransferStopped: _S.FREEING,
        TransferAcked: _S.STOPPING,  # crossed with our stop, whose own answer is on its way
        TransferFailed: _S.STOPPING,
        Scheduled: _S.STOPPING,  # all of these: the step that was running when we gave up
        FirstTokenComputed: _S.STOPPING,
        LastTokenComputed: _S.STOPPING,
        EngineFailed: _S.STOPPING,
        AbortRequested: _S.STOPPING,  # its fate is sealed already
        GatewayLost: _S.STOPPING,
        WorkerClosed: _S.STOPPING,
        Bound: _S.STOPPING,
        KeptHere: _S.STOPPING,
    },
    _S.FREEING: {
        BlocksFreed: _S.CLOSED,
        TransferStopped: _S.FREEING,
        TransferAcked: _S.FREEING,
        TransferFailed: _S.FREEING,
        Scheduled: _S.FREEING,  # as above
        FirstTokenComputed: _S.FREEING,
        LastTokenComputed: _S.FREEING,
        TokensProduced: _S.FREEING,
        StreamFinished: _S.FREEING,
        EngineFailed: _S.FREEING,
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        WorkerClosed: _S.FREEING,
        Bound: _S.FREEING,
        KeptHere: _S.FREEING,
    },
    _S.CLOSED: {},
}


class PrefillRequest:
    """The machine of one request.

    Args:
        hand_off: None: this worker generates all of it.
        compute_timeout_s: from acceptance to the first token.
        bind_timeout_s: from the first token to the word of the gateway where it goes on.
        send_timeout_s: from the first token, or the later word, to the ACK.
    """

    def __init__(
        self,
        request: GenerateRequest,
        hand_off: HandOff | None,
        *,
        now: float,
        compute_timeout_s: float,
        bind_timeout_s: float,
        send_timeout_s: float,
    ) -> None:
        self.request = request
        self.hand_off = hand_off
        if hand_off is None:
            self.state = PrefillState.GENERATING
        else:
            self.state = PrefillState.COMPUTING if hand_off.to else PrefillState.UNBOUND
        self.ended_by = ""  # the event that sealed its fate
        self._times = PromptTimes(now)
        self._first_token_id: int | None = None
        self._end: SendHandedOver | SendFailed | None = None
        self._bind_timeout_s = bind_timeout_s
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
        self.state = after
        if after is before and before not in LIVING:
            return []
        cause = type(event).__name__
        if before in LIVING and after not in LIVING:
            self.ended_by = cause
        effects = self._take(event, before, now)
        if after is not before:
            effects += self._enter(after, before, cause, now)
        elif self._times.is_computed and after is PrefillState.GENERATING:
            self._deadline = None
        return effects

    def check(self) -> None:
        """Assert what must hold between events."""
        is_computed, state = self._times.is_computed, self.state
        assert (self._deadline is not None) == (state in LIVING and not (state is _S.GENERATING and is_computed))
        assert not (state in (_S.UNBOUND, _S.COMPUTING) and is_computed)
        assert not (state in (_S.LEASED, _S.SENDING) and self._first_token_id is None)
        assert not (state in LIVING and self._end is not None)
        is_bound = self.hand_off is not None and self.hand_off.to is not None
        assert not (state in (_S.COMPUTING, _S.SENDING, _S.STOPPING) and not is_bound)
        assert not (state in (_S.UNBOUND, _S.LEASED, _S.GENERATING) and is_bound)

    # Inside

    def _take(self, event: Event, before: PrefillState, now: float) -> list[Effect]:
        """Return what the event itself is worth."""
        cause = type(event).__name__
        match event:
            case Scheduled(cached_tokens) if not self._times.is_computed:
                self._times.scheduled(now, cached_tokens)
            case FirstTokenComputed(output) | LastTokenComputed(output):
                self._first_token_id = output.tokens[0].token_id
                return [self._times.computed(self.request_id, now, cause), SendOutput(output, cause)]
            case TokensProduced(output) | StreamFinished(output):
                return [SendOutput(output, cause)]
            case Bound(to) if before in (PrefillState.UNBOUND, PrefillState.LEASED):
                assert self.hand_off is not None
                self.hand_off = replace(self.hand_off, to=to)
                return [OfferTransfer(to, cause)]
            case KeptHere() if before in (PrefillState.UNBOUND, PrefillState.LEASED):
                return [KeepInEngine(self.request_id, cause)]
            case TransferAcked(link):
                self._end = SendHandedOver(self.request_id, link, cause)
            case TransferFailed(reason, detail):
                self._end = SendFailed(self.request_id, TransferError(reason, detail), cause)
            case EngineFailed(error) | WorkerClosed(error):
                self._end = SendFailed(self.request_id, error, cause)
            case DeadlinePassed():
                late = (
                    "no decode worker was named in time" if before is _S.LEASED else "no acknowledgement came in time"
                )
                is_leased = before in (_S.LEASED, _S.SENDING)
                error = TransferError("lease_expired", late) if is_leased else WorkerLost("not computed in time")
                self._end = SendFailed(self.request_id, error, cause)
            case _:
                pass  # nobody to tell, or told already
        return []

    def _enter(self, after: PrefillState, before: PrefillState, cause: str, now: float) -> list[Effect]:
        """Return what every way into a state has in common."""
        match after:
            case PrefillState.COMPUTING:
                pass  # the prompt has the time that it had
            case PrefillState.LEASED:
                self._deadline = now + self._bind_timeout_s
            case PrefillState.SENDING:
                assert self._first_token_id is not None
                self._deadline = now + self._send_timeout_s
                return [CommitTransfer(self._first_token_id, cause)]
            case PrefillState.GENERATING:
                self._deadline = None if self._times.is_computed else self._deadline
            case PrefillState.STOPPING:
                self._deadline = None
                return [StopTransfer(self.request_id, self.transfer_id, cause, cause)]
            case PrefillState.FREEING:
                self._deadline = None
                is_leased = self._times.is_computed and before is not PrefillState.GENERATING
                return [(ReleaseBlocks if is_leased else AbortInEngine)(self.request_id, cause)]
            case _:
                self._deadline = None
                return [] if self._end is None else [self._end]
        return []
