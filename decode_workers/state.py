"""One request on a decode worker, from the reservation of its blocks until nothing of it is left here.

With the KV from a prefill worker:

1. RESERVING: the policy took it; the engine was asked for blocks for the whole prompt.
2. RESERVED: accepted, and the gateway was told what prefix is here already. KV may be written into the blocks.
3. RUNNING: every frame has landed and was verified; the request is in the decode batch and produces tokens.
4. STOPPING: its fate was sealed before it landed; the transfer is being stopped, because blocks that it may still write
   cannot be freed.
5. FREEING: nothing writes the blocks; the engine was told to free them. What a running step still says of the request
   comes before its answer, so a later request of the same id never meets an output of this one.
6. CLOSED: the blocks are free, and only now the gateway learns of a failure: whoever hears it may send the id again.

The good way is RESERVING, RESERVED, RUNNING, CLOSED: the engine frees a finished request itself. A request that is
computed here from its prompt on takes the way QUEUEING (the engine was asked to take it), GENERATING, CLOSED. The shell
owns no decision: it feeds events, performs the effects in their order, and arms one timer.
"""

from collections.abc import Mapping
from enum import StrEnum

from core.errors import InvalidTransition, RejectedError, TransferError, WorkerLost
from core.ids import RequestId, TransferId
from core.request import GenerateRequest
from decode_workers.messages import (
    ActivateInEngine,
    BlocksReserved,
    Effect,
    EngineRefused,
    Event,
    Expected,
    ExpectTransfer,
    KvLanded,
    PromptQueued,
    SendLanded,
    TransferCancelled,
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
    SendAccepted,
    SendFailed,
    SendOutput,
    SendRejected,
    StopTransfer,
    StreamFinished,
    TokensProduced,
    TransferFailed,
    TransferStopped,
    WorkerClosed,
)
from workers.prompt_times import PromptTimes


class DecodeState(StrEnum):
    QUEUEING = "queueing"
    GENERATING = "generating"
    RESERVING = "reserving"
    RESERVED = "reserved"
    RUNNING = "running"
    STOPPING = "stopping"
    FREEING = "freeing"
    CLOSED = "closed"


_S = DecodeState
LIVING = frozenset({_S.QUEUEING, _S.GENERATING, _S.RESERVING, _S.RESERVED, _S.RUNNING})
EDGES: Mapping[DecodeState, Mapping[type[Event], DecodeState]] = {
    _S.QUEUEING: {
        PromptQueued: _S.GENERATING,
        EngineRefused: _S.CLOSED,  # its queue is full, or a request that this engine cannot serve
        AbortRequested: _S.FREEING,  # the engine is told after it was asked, so it drops what it may take
        GatewayLost: _S.FREEING,
        WorkerClosed: _S.FREEING,
    },
    _S.GENERATING: {
        Scheduled: _S.GENERATING,  # a step began that computes some of the prompt
        FirstTokenComputed: _S.GENERATING,
        TokensProduced: _S.GENERATING,
        LastTokenComputed: _S.CLOSED,
        StreamFinished: _S.CLOSED,
        EngineFailed: _S.FREEING,  # late refusal, or a failed step
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        DeadlinePassed: _S.FREEING,  # before the first token: the engine is hopelessly behind
        WorkerClosed: _S.FREEING,
    },
    _S.RESERVING: {
        BlocksReserved: _S.RESERVED,
        EngineRefused: _S.CLOSED,  # no blocks, or a request that this engine cannot serve
        AbortRequested: _S.FREEING,  # as in QUEUEING
        GatewayLost: _S.FREEING,
        WorkerClosed: _S.FREEING,
    },
    _S.RESERVED: {
        KvLanded: _S.RUNNING,  # the receiver verified the last frame
        TransferFailed: _S.FREEING,  # the prefill worker died, a frame was bad, no offer came
        TransferCancelled: _S.FREEING,  # the prefill worker gave up, or its first token was the last
        AbortRequested: _S.STOPPING,  # as well when the first token was the last: the first word counts
        GatewayLost: _S.STOPPING,
        DeadlinePassed: _S.STOPPING,  # the backstop behind the transfer's own leases
        EngineFailed: _S.STOPPING,  # the engine lost its pool
        WorkerClosed: _S.STOPPING,
    },
    _S.RUNNING: {
        TokensProduced: _S.RUNNING,
        StreamFinished: _S.CLOSED,
        EngineFailed: _S.FREEING,
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        WorkerClosed: _S.FREEING,
    },
    _S.STOPPING: {
        TransferStopped: _S.FREEING,
        KvLanded: _S.STOPPING,  # crossed with our stop, whose own answer is on its way
        TransferFailed: _S.STOPPING,
        TransferCancelled: _S.STOPPING,
        EngineFailed: _S.STOPPING,
        AbortRequested: _S.STOPPING,  # its fate is sealed already
        GatewayLost: _S.STOPPING,
        WorkerClosed: _S.STOPPING,
    },
    _S.FREEING: {
        BlocksFreed: _S.CLOSED,
        BlocksReserved: _S.FREEING,  # we gave up while the engine was asked
        PromptQueued: _S.FREEING,
        EngineRefused: _S.FREEING,
        KvLanded: _S.FREEING,
        TransferFailed: _S.FREEING,
        TransferCancelled: _S.FREEING,
        TransferStopped: _S.FREEING,
        Scheduled: _S.FREEING,  # all of these: the step that was running when we gave up
        FirstTokenComputed: _S.FREEING,
        LastTokenComputed: _S.FREEING,
        TokensProduced: _S.FREEING,
        StreamFinished: _S.FREEING,
        EngineFailed: _S.FREEING,
        AbortRequested: _S.FREEING,
        GatewayLost: _S.FREEING,
        WorkerClosed: _S.FREEING,
    },
    _S.CLOSED: {},
}


class DecodeRequest:
    """The machine of one request.

    Args:
        expected: the transfer of its KV; None: the prompt is computed here.
        compute_timeout_s: from acceptance to the first token, of a prompt that is computed here.
        landing_timeout_s: from acceptance to the last frame, of one that is not.
    """

    def __init__(
        self,
        request: GenerateRequest,
        expected: Expected | None,
        *,
        now: float,
        compute_timeout_s: float,
        landing_timeout_s: float,
    ) -> None:
        self.request = request
        self.expected = expected
        self.held_tokens = 0
        self.state = DecodeState.QUEUEING if expected is None else DecodeState.RESERVING
        self.ended_by = ""  # the event that sealed its fate
        self._times = PromptTimes(now)
        self._compute_timeout_s = compute_timeout_s
        self._landing_timeout_s = landing_timeout_s
        self._deadline: float | None = None
        self._landed: KvLanded | None = None  # until the gateway was told
        self._landed_at = 0.0
        self._end: SendFailed | None = None

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def transfer_id(self) -> TransferId | None:
        return self.expected.transfer_id if self.expected else None

    @property
    def is_closed(self) -> bool:
        return self.state is DecodeState.CLOSED

    def next_deadline(self) -> float | None:
        """When `DeadlinePassed` is due.

        Only a reservation can be forgotten by everybody else, and only a prompt can wait for ever to be computed:
        asking the engine and freeing are bounded by a step, stopping a transfer by the transfer service, producing
        tokens by max_tokens.
        """
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
        self.state = after
        if after is before and before not in LIVING:
            return []
        cause = type(event).__name__
        if before in LIVING and after not in LIVING:
            self.ended_by = cause
        effects = self._take(event, now)
        if after is not before:
            effects += self._enter(after, cause, now)
        elif self._times.is_computed:
            self._deadline = None
        return effects

    def check(self) -> None:
        """Assert what must hold between events."""
        is_waiting = self.state is _S.GENERATING and not self._times.is_computed
        assert (self._deadline is not None) == (self.state is _S.RESERVED or is_waiting)
        assert not (self.state in (_S.RESERVING, _S.RESERVED) and self._landed is not None)
        assert not (self.state in LIVING and self._end is not None)
        is_expected = self.expected is not None
        assert not (self.state in (_S.QUEUEING, _S.GENERATING) and is_expected)
        assert not (self.state in (_S.RESERVING, _S.RESERVED, _S.RUNNING, _S.STOPPING) and not is_expected)

    # Inside

    def _take(self, event: Event, now: float) -> list[Effect]:
        """Return what the event itself is worth."""
        cause = type(event).__name__
        match event:
            case BlocksReserved(held_tokens):
                assert self.expected is not None
                self.held_tokens = held_tokens
                expected, num_tokens = self.expected, self.request.num_prompt_tokens
                ids = (self.request_id, expected.transfer_id)
                return [
                    ExpectTransfer(*ids, held_tokens, num_tokens, expected.lease_s, cause),
                    SendAccepted(self.request_id, held_tokens, cause),
                ]
            case PromptQueued(cached_tokens):
                return [SendAccepted(self.request_id, cached_tokens, cause)]
            case EngineRefused(RejectedError() as error):
                return [SendRejected(self.request_id, error, cause)]
            case EngineRefused(error):
                return [SendFailed(self.request_id, error, cause)]
            case Scheduled(cached_tokens) if not self._times.is_computed:
                self._times.scheduled(now, cached_tokens)
            case FirstTokenComputed(output) | LastTokenComputed(output):
                return [self._times.computed(self.request_id, now, cause), SendOutput(output, cause)]
            case KvLanded():
                self._landed, self._landed_at = event, now
                exactness = event.is_lossless, event.dropped_tokens
                return [ActivateInEngine(self.request_id, event.first_token_id, *exactness, cause)]
            case TokensProduced(output) | StreamFinished(output):
                return [*self._tell_landed(now, cause), SendOutput(output, cause)]
            case TransferFailed(reason, detail) | TransferCancelled(reason, detail):
                self._end = SendFailed(self.request_id, TransferError(reason, detail), cause)
            case EngineFailed(error) | WorkerClosed(error):
                self._end = SendFailed(self.request_id, error, cause)
            case DeadlinePassed():
                late = TransferError("lease_expired", "the KV did not land in time")
                error = late if self.expected else WorkerLost("not computed in time")
                self._end = SendFailed(self.request_id, error, cause)
            case _:
                pass  # nobody to tell, or told at the end
        return []

    def _enter(self, after: DecodeState, cause: str, now: float) -> list[Effect]:
        """Return what every way into a state has in common."""
        self._deadline = None
        match after:
            case DecodeState.RESERVED:
                self._deadline = now + self._landing_timeout_s
            case DecodeState.GENERATING:
                self._deadline = now + self._compute_timeout_s
            case DecodeState.STOPPING:
                return [StopTransfer(self.request_id, self.transfer_id, cause, cause)]
            case DecodeState.FREEING:
                return [AbortInEngine(self.request_id, cause)]
            case DecodeState.CLOSED if self._end is not None:
                return [self._end]
        return []

    def _tell_landed(self, now: float, cause: str) -> list[Effect]:
        landed, self._landed = self._landed, None
        if landed is None:
            return []
        sent = self.request.num_prompt_tokens - self.held_tokens - landed.dropped_tokens
        first_decode_s = now - self._landed_at
        return [
            SendLanded(
                self.request_id,
                exposed_s=landed.exposed_s,
                first_decode_s=first_decode_s,
                kv_tokens_held=self.held_tokens,
                kv_tokens_sent=sent,
                kv_bytes=landed.kv_bytes,
                kv_wire_bytes=landed.kv_wire_bytes,
                kv_profile=landed.kv_profile,
                is_lossless=landed.is_lossless,
                cause=cause,
            )
        ]
