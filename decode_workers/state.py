"""One request on a decode worker, from the reservation of its blocks until nothing of it is left here.

1. RESERVING: the policy took it; the engine was asked for blocks for the whole prompt.
2. RESERVED: accepted, and the gateway was told what prefix is here already. KV may be written into the blocks.
3. RUNNING: every frame has landed and was verified; the request is in the decode batch and produces tokens.
4. STOPPING: its fate was sealed before it landed; the transfer is being stopped, because blocks that it may still write
   cannot be freed.
5. FREEING: nothing writes the blocks; the engine was told to free them. What a running step still says of the request
   comes before its answer, so a later request of the same id never meets an output of this one.
6. CLOSED: the blocks are free, and only now the gateway learns of a failure: whoever hears it may send the id again.

The good way is RESERVING, RESERVED, RUNNING, CLOSED: the engine frees a finished request itself. The shell owns no
decision: it feeds events, performs the effects in their order, and arms one timer.
"""

from collections.abc import Mapping
from enum import StrEnum

from core.errors import InvalidTransition, RejectedError, TransferError
from core.ids import RequestId, TransferId
from core.request import GenerateRequest
from decode_workers.messages import (
    ActivateInEngine,
    BlocksReserved,
    Effect,
    Event,
    ExpectTransfer,
    KvLanded,
    ReservationRefused,
    SendLanded,
    StreamFinished,
    TokensProduced,
    TransferCancelled,
)
from workers.messages import (
    AbortInEngine,
    AbortRequested,
    BlocksFreed,
    DeadlinePassed,
    EngineFailed,
    GatewayLost,
    SendAccepted,
    SendFailed,
    SendOutput,
    SendRejected,
    StopTransfer,
    TransferFailed,
    TransferStopped,
    WorkerClosed,
)


class DecodeState(StrEnum):
    RESERVING = "reserving"
    RESERVED = "reserved"
    RUNNING = "running"
    STOPPING = "stopping"
    FREEING = "freeing"
    CLOSED = "closed"


EDGES: Mapping[DecodeState, Mapping[type[Event], DecodeState]] = {
    DecodeState.RESERVING: {
        BlocksReserved: DecodeState.RESERVED,
        ReservationRefused: DecodeState.CLOSED,  # no blocks, or a request that this engine cannot serve
        AbortRequested: DecodeState.FREEING,  # the engine is told after it was asked, so it frees what it may reserve
        GatewayLost: DecodeState.FREEING,
        WorkerClosed: DecodeState.FREEING,
    },
    DecodeState.RESERVED: {
        KvLanded: DecodeState.RUNNING,  # the receiver verified the last frame
        TransferFailed: DecodeState.FREEING,  # the prefill worker died, a frame was bad, no offer came
        TransferCancelled: DecodeState.FREEING,  # the prefill worker gave up, or its first token was the last
        AbortRequested: DecodeState.STOPPING,  # as well when the first token was the last: the first word counts
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
        TransferCancelled: DecodeState.STOPPING,
        EngineFailed: DecodeState.STOPPING,
        AbortRequested: DecodeState.STOPPING,  # its fate is sealed already
        GatewayLost: DecodeState.STOPPING,
        WorkerClosed: DecodeState.STOPPING,
    },
    DecodeState.FREEING: {
        BlocksFreed: DecodeState.CLOSED,
        BlocksReserved: DecodeState.FREEING,  # we gave up while the engine was asked
        ReservationRefused: DecodeState.FREEING,
        KvLanded: DecodeState.FREEING,
        TransferFailed: DecodeState.FREEING,
        TransferCancelled: DecodeState.FREEING,
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


class DecodeRequest:
    """The machine of one request.

    Args:
        lease_s: the transfer lapses when nothing is heard of it for so long.
        landing_timeout_s: from acceptance to the last frame.
    """

    def __init__(
        self,
        request: GenerateRequest,
        transfer_id: TransferId,
        *,
        lease_s: float,
        landing_timeout_s: float,
    ) -> None:
        self.request = request
        self.transfer_id = transfer_id
        self.held_tokens = 0
        self.state = DecodeState.RESERVING
        self.ended_by = ""  # the event that sealed its fate
        self._lease_s = lease_s
        self._landing_timeout_s = landing_timeout_s
        self._deadline: float | None = None
        self._landed: KvLanded | None = None  # until the gateway was told
        self._landed_at = 0.0
        self._end: SendFailed | None = None

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def is_closed(self) -> bool:
        return self.state is DecodeState.CLOSED

    def next_deadline(self) -> float | None:
        """When `DeadlinePassed` is due.

        Only a reservation can be forgotten by everybody else: asking the engine and freeing are bounded by a step,
        stopping a transfer by the transfer service, running by max_tokens.
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
        if after is before and after is not DecodeState.RUNNING:
            return []
        self.state = after
        self._deadline = now + self._landing_timeout_s if after is DecodeState.RESERVED else None
        cause = type(event).__name__
        if after in (DecodeState.STOPPING, DecodeState.FREEING, DecodeState.CLOSED):
            self.ended_by = self.ended_by or cause
        effects: list[Effect] = []
        match event:
            case BlocksReserved(held_tokens):
                self.held_tokens = held_tokens
                num_tokens = self.request.num_prompt_tokens
                ids = (self.request_id, self.transfer_id)
                effects.append(ExpectTransfer(*ids, held_tokens, num_tokens, self._lease_s, cause))
                effects.append(SendAccepted(self.request_id, held_tokens, cause))
            case ReservationRefused(RejectedError() as error):
                effects.append(SendRejected(self.request_id, error, cause))
            case ReservationRefused(error):
                effects.append(SendFailed(self.request_id, error, cause))
            case KvLanded():
                self._landed, self._landed_at = event, now
                activate = ActivateInEngine(
                    self.request_id, event.first_token_id, event.is_lossless, event.dropped_tokens, cause
                )
                effects.append(activate)
            case TokensProduced(output) | StreamFinished(output):
                effects.extend(self._tell_landed(now, cause))
                effects.append(SendOutput(output, cause))
            case TransferFailed(reason, detail) | TransferCancelled(reason, detail):
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
        living = (DecodeState.RESERVING, DecodeState.RESERVED, DecodeState.RUNNING)
        assert not (self.state in living[:2] and self._landed is not None)
        assert not (self.state in living and self._end is not None)

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
