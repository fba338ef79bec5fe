"""The life of one request in the gateway: events in, effects out. Knows no clock, no socket, no policy.

1. RECEIVED; admission takes it: QUEUED. Its turn comes: ROUTING, the policy is asked.
2. RESERVING: the chosen decode worker is asked to reserve blocks. It accepts: DISPATCHING, the prefill worker is
   asked. It accepts: PREFILLING, and the request leaves the queue. A request of one token has no decode worker and
   skips RESERVING.
3. A refusal asks somebody else: another pair (ROUTING), or, once a decode worker has accepted, another prefill worker
   for it under the same transfer id (REROUTING). With nobody left to ask it is QUEUED again, in its old place.
4. The prefill worker's token goes to the client: HANDING_OVER until either worker tells that the KV arrived, then
   DECODING until FINISHED. Or the first token was the last. The two workers' streams are not ordered against each
   other: news of the decode worker that comes before the first token is kept until that is here.
5. A worker that is lost before the first token costs an attempt, at most `max_losses` of them (a prompt that kills
   workers must not kill the pool). After the first token it ends the request: FAILED with UNAVAILABLE.
6. Whatever ends it early, both workers are told to free what they hold.

Every attempt to reserve has a number of its own, and so a work id of its own: a late message of an older attempt names
a work that the shell does not know any more.
"""

from collections.abc import Mapping
from enum import StrEnum

from core.errors import DeadlineExceeded, InvalidTransition, ProtocolError, RejectReason, ServingError, WorkerLost
from core.ids import RequestId, WorkerId
from core.request import Finish, TokenOutput
from router import messages as m
from router.timeline import Timeline


class RequestState(StrEnum):
    RECEIVED = "received"
    QUEUED = "queued"
    ROUTING = "routing"
    RESERVING = "reserving"
    DISPATCHING = "dispatching"
    REROUTING = "rerouting"
    PREFILLING = "prefilling"
    HANDING_OVER = "handing_over"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


S = RequestState
TERMINAL = frozenset({S.FINISHED, S.FAILED, S.ABORTED})
ALL_EVENTS: tuple[type[m.Event], ...] = m.Event.__args__
_EARLY_NEWS: tuple[type[m.Event], ...] = (m.KvLanded, m.DecodeProduced, m.DecodeFinished)
_ENDS: Mapping[type[m.Event], RequestState] = {m.RequestFailed: S.FAILED, m.AbortRequested: S.ABORTED}

EDGES: Mapping[RequestState, Mapping[type[m.Event], RequestState]] = {
    S.RECEIVED: {m.Queued: S.QUEUED, **_ENDS},
    S.QUEUED: {m.Released: S.ROUTING, **_ENDS},
    S.ROUTING: {
        m.PairChosen: S.RESERVING,
        m.PrefillChosen: S.DISPATCHING,  # the first token is the last: no decode worker
        m.NothingFits: S.QUEUED,
        **_ENDS,
    },
    S.RESERVING: {
        m.DecodeAccepted: S.DISPATCHING,
        m.DecodeRejected: S.ROUTING,
        m.DecodeLost: S.ROUTING,
        **_ENDS,
    },
    S.DISPATCHING: {
        m.PrefillAccepted: S.PREFILLING,
        m.PrefillRejected: S.REROUTING,  # it kept nothing: the reservation and its transfer id stay good
        m.PrefillLost: S.ROUTING,  # it may have offered the transfer already: the id is spent
        m.DecodeLost: S.ROUTING,
        **dict.fromkeys(_EARLY_NEWS, S.DISPATCHING),  # kept: it overtook the prefill worker's answer
        **_ENDS,
    },
    S.REROUTING: {
        m.PrefillChosen: S.DISPATCHING,
        m.NothingFits: S.QUEUED,
        m.DecodeLost: S.ROUTING,
        **_ENDS,
    },
    S.PREFILLING: {
        m.PrefillProduced: S.HANDING_OVER,
        m.PrefillFinished: S.FINISHED,
        m.PrefillLost: S.ROUTING,
        m.DecodeLost: S.ROUTING,
        **dict.fromkeys(_EARLY_NEWS, S.PREFILLING),  # kept: it overtook the first token
        **_ENDS,
    },
    S.HANDING_OVER: {
        m.PrefillMeasured: S.HANDING_OVER,
        m.KvHandedOver: S.DECODING,  # either news may be the first
        m.KvLanded: S.DECODING,
        m.PrefillLost: S.FAILED,
        m.DecodeLost: S.FAILED,
        **_ENDS,
    },
    S.DECODING: {
        m.PrefillMeasured: S.DECODING,
        m.KvHandedOver: S.DECODING,
        m.KvLanded: S.DECODING,
        m.PrefillLost: S.DECODING,  # it holds nothing of the request any more
        m.DecodeProduced: S.DECODING,
        m.DecodeFinished: S.FINISHED,
        m.DecodeLost: S.FAILED,
        **_ENDS,
    },
    # Whatever comes after the end is late news of it.
    S.FINISHED: dict.fromkeys(ALL_EVENTS, S.FINISHED),
    S.FAILED: dict.fromkeys(ALL_EVENTS, S.FAILED),
    S.ABORTED: dict.fromkeys(ALL_EVENTS, S.ABORTED),
}


class RequestMachine:
    """One request.

    Attributes:
        prefill, decode: the workers that hold, or are being asked to hold, the request now.
        prefill_worker, decode_worker: the workers that served it, as far as it got.
        attempt: number of the reservation (from 0); names the work on the wire.
        num_asked: how many placements were tried, refusals included.
        num_tokens: delivered so far; the next token must have this index.
        cached_tokens: prompt tokens that the prefill worker had.
    """

    def __init__(
        self,
        request_id: RequestId,
        *,
        arrived_at: float,
        deadline_at: float,
        accept_timeout_s: float,
        max_losses: int,
    ) -> None:
        self.request_id = request_id
        self.state = S.RECEIVED
        self.prefill: WorkerId | None = None
        self.decode: WorkerId | None = None
        self.prefill_worker: WorkerId | None = None
        self.decode_worker: WorkerId | None = None
        self.attempt = -1
        self.num_asked = 0
        self.num_tokens = 0
        self.cached_tokens = 0
        self.reason = ""
        self.landed: m.KvLanded | None = None
        self.timeline = Timeline(arrived_at)
        self._deadline_at = deadline_at
        self._accept_timeout_s = accept_timeout_s
        self._answer_due_at: float | None = None
        self._max_losses = max_losses
        self._num_losses = 0
        self._refusals: dict[WorkerId, RejectReason | None] = {}  # in this round; None: lost
        self._retry_after_s = 0.0
        self._early: list[m.Event] = []  # news of the decode worker that overtook the first token
        self._num_early_tokens = 0

    @property
    def is_over(self) -> bool:
        return self.state in TERMINAL

    @property
    def is_too_long(self) -> bool:
        """Everybody who was asked in this round said that the request can never fit."""
        return bool(self._refusals) and all(why is RejectReason.TOO_LONG for why in self._refusals.values())

    def next_deadline(self) -> float | None:
        """When `poll` has something to do; None once over."""
        if self.is_over:
            return None
        return self._deadline_at if self._answer_due_at is None else min(self._deadline_at, self._answer_due_at)

    def poll(self, now: float) -> list[m.Effect]:
        """Notice what did not happen in time."""
        if self.is_over:
            return []
        if now >= self._deadline_at:
            return self.handle(m.RequestFailed(DeadlineExceeded(f"deadline passed while {self.state}")), now)
        if self._answer_due_at is not None and now >= self._answer_due_at:
            silent = self.decode if self.state is S.RESERVING else self.prefill
            error = WorkerLost(f"{silent} neither accepted nor rejected within {self._accept_timeout_s:g} s")
            lost = m.DecodeLost(error) if self.state is S.RESERVING else m.PrefillLost(error)
            return self.handle(lost, now)
        return []

    def handle(self, event: m.Event, now: float) -> list[m.Effect]:
        """Take one event.

        Raises:
            InvalidTransition: no edge; nothing changed.
            ProtocolError: token indices have a gap or repeat, or tokens have no place to come from; nothing changed.
        What was kept early was checked when it came, and so is never refused when it is replayed here.
        """
        event = self._escalated(event)
        after = EDGES[self.state].get(type(event))
        if after is None:
            raise InvalidTransition("request", self.state, event)
        if self.is_over:
            return []
        effects = self._effects(event, now)
        self.state = after
        self._answer_due_at = now + self._accept_timeout_s if after in (S.RESERVING, S.DISPATCHING) else None
        if after is S.HANDING_OVER:
            early, self._early = self._early, []
            for kept in early:
                effects += self.handle(kept, now)
        return effects

    def check(self) -> None:
        """Assert what must hold between events."""
        has_decode = self.state in (S.RESERVING, S.HANDING_OVER, S.DECODING)
        assert not has_decode or self.decode is not None
        has_prefill = self.state in (S.RESERVING, S.DISPATCHING, S.PREFILLING, S.HANDING_OVER)
        assert not has_prefill or self.prefill is not None
        assert not self._early or self.state in (S.DISPATCHING, S.PREFILLING, *TERMINAL)
        assert self.state not in (S.RECEIVED, S.QUEUED, S.ROUTING) or (self.prefill, self.decode) == (None, None)
        assert not self.is_over or (self.prefill, self.decode) == (None, None)
        assert (self.num_tokens > 0) == (self.timeline.first_token_at is not None)
        assert self.num_tokens == 0 or self.state in (S.HANDING_OVER, S.DECODING, *TERMINAL)
        assert self._num_losses <= self._max_losses or self.is_over

    def _escalated(self, event: m.Event) -> m.Event:
        """A loss that would be retried becomes a failure when there were enough of them."""
        if isinstance(event, m.PrefillLost | m.DecodeLost) and self._num_losses >= self._max_losses:
            return m.RequestFailed(event.error) if EDGES[self.state].get(type(event)) is S.ROUTING else event
        return event

    def _effects(self, event: m.Event, now: float) -> list[m.Effect]:
        """Change everything but the state. Called only for events that have an edge from a living state."""
        match event:
            case m.Queued():
                return []
            case m.PrefillLost() if self.state is S.DECODING:
                return []
            case m.Released():
                return self._begin_round(now)
            case m.PairChosen(decision):
                return self._reserve(decision.winner.prefill, decision.winner.decode, decision.reason)
            case m.PrefillChosen(decision):
                return self._dispatch(decision.winner.prefill, decision.reason)
            case m.NothingFits(outcome):
                return self._give_up_round(f"{outcome.role}: {outcome.obstacle}")
            case m.DecodeAccepted():
                assert self.prefill is not None
                return [m.SubmitPrefill(self.prefill, self.decode, self.attempt)]
            case m.DecodeRejected(error):
                return self._refused_by_decode(error.reason, error.retry_after_s)
            case m.PrefillRejected(error):
                return self._refused_by_prefill(error.reason, error.retry_after_s)
            case m.PrefillAccepted(cached_tokens):
                self.cached_tokens = cached_tokens
                self.prefill_worker = self.prefill
                self.timeline.prefill_accepted(now)
                return [m.LeaveQueue()]
            case m.PrefillProduced(tokens):
                if self.decode is None or not tokens:
                    raise ProtocolError("the prefill worker neither finished the request nor began its hand-over")
                if self._num_early_tokens and len(tokens) != 1:  # they were checked to follow one token
                    raise ProtocolError("both workers produced the same token")
                return self._deliver(tokens, now)
            case m.KvLanded() | m.DecodeProduced() | m.DecodeFinished() if self.num_tokens == 0:
                return self._keep(event)
            case m.DecodeProduced(tokens):
                return self._deliver(tokens, now)
            case m.PrefillFinished(tokens, finish) | m.DecodeFinished(tokens, finish):
                return self._finish(tokens, finish, now)
            case m.PrefillMeasured(cached_tokens=cached_tokens):
                self.cached_tokens = cached_tokens
                return []
            case m.KvLanded():
                self.landed, self.decode_worker = event, self.decode
                return self._release_prefill()
            case m.KvHandedOver():
                self.decode_worker = self.decode
                return self._release_prefill()
            case m.PrefillLost(error) | m.DecodeLost(error):
                return self._lost(event, error, now)
            case m.RequestFailed(error) | m.AbortRequested(error):
                return self._end(error)
            case _:
                raise AssertionError(f"{type(event).__name__} has an edge but no effect")

    def _begin_round(self, now: float) -> list[m.Effect]:
        self._refusals.clear()
        self._retry_after_s = 0.0
        self.timeline.dispatched(now)
        return [m.ChoosePair(frozenset())]

    def _reserve(self, prefill: WorkerId, decode: WorkerId | None, reason: str) -> list[m.Effect]:
        assert decode is not None, "a pair has a decode worker"
        self.attempt += 1
        self.num_asked += 1
        self.prefill, self.decode, self.reason = prefill, decode, reason
        return [m.SubmitDecode(decode, prefill, self.attempt)]

    def _dispatch(self, prefill: WorkerId, reason: str) -> list[m.Effect]:
        if self.decode is None:
            self.attempt += 1
        self.num_asked += 1
        self.prefill, self.reason = prefill, reason
        return [m.SubmitPrefill(prefill, self.decode, self.attempt)]

    def _give_up_round(self, cause: str) -> list[m.Effect]:
        return [*self._free_workers("no prefill worker accepts"), m.ReturnToQueue(cause, self._retry_after_s)]

    def _refused_by_decode(self, reason: RejectReason, retry_after_s: float) -> list[m.Effect]:
        assert self.decode is not None
        self._refuse(self.decode, reason, retry_after_s)
        released = [m.ReleaseWorker(worker) for worker in (self.prefill, self.decode) if worker is not None]
        self.prefill = self.decode = None
        return [*released, m.ChoosePair(frozenset(self._refusals))]

    def _refused_by_prefill(self, reason: RejectReason, retry_after_s: float) -> list[m.Effect]:
        assert self.prefill is not None
        refuser, self.prefill = self.prefill, None
        self._forget_early()
        self._refuse(refuser, reason, retry_after_s)
        return [m.ReleaseWorker(refuser), m.ChoosePrefill(frozenset(self._refusals), self.decode)]

    def _refuse(self, worker_id: WorkerId, reason: RejectReason | None, retry_after_s: float) -> None:
        self._refusals[worker_id] = reason
        self._retry_after_s = max(self._retry_after_s, retry_after_s)

    def _lost(self, event: m.Event, error: ServingError, now: float) -> list[m.Effect]:
        if self.num_tokens:
            return self._end(error)
        self._num_losses += 1
        self._forget_early()
        culprit = self.decode if isinstance(event, m.DecodeLost) else self.prefill
        if culprit is not None:
            self._refuse(culprit, None, 0.0)
        return [*self._free_workers(f"retry elsewhere: {error}"), m.ChoosePair(frozenset(self._refusals))]

    def _keep(self, event: m.KvLanded | m.DecodeProduced | m.DecodeFinished) -> list[m.Effect]:
        """Checked now, so that it cannot be refused when its turn comes."""
        if self.decode is None or isinstance(event, m.KvLanded) is bool(self._early):
            raise ProtocolError("a decode worker's news must begin with the landing of the KV, and have it once")
        if not isinstance(event, m.KvLanded):
            self._expect(event.tokens, first=1 + self._num_early_tokens)
            self._num_early_tokens += len(event.tokens)
        self._early.append(event)
        return []

    def _forget_early(self) -> None:
        self._early.clear()
        self._num_early_tokens = 0

    def _release_prefill(self) -> list[m.Effect]:
        released, self.prefill = self.prefill, None
        return [m.ReleaseWorker(released)] if released is not None else []

    def _deliver(self, tokens: tuple[TokenOutput, ...], now: float) -> list[m.Effect]:
        self._expect(tokens, first=self.num_tokens)
        self.num_tokens += len(tokens)
        if tokens:
            self.timeline.tokens_arrived(now)
        return [m.Deliver(tokens)] if tokens else []

    def _expect(self, tokens: tuple[TokenOutput, ...], *, first: int) -> None:
        for index, token in enumerate(tokens, first):
            if token.index != index:
                raise ProtocolError(f"expected token {index}, got token {token.index}")

    def _finish(self, tokens: tuple[TokenOutput, ...], finish: Finish, now: float) -> list[m.Effect]:
        effects = self._deliver(tokens, now)
        by_prefill = self.state is S.PREFILLING
        if by_prefill and self.decode is not None:
            effects.append(m.AbortWork(self.decode, "the first token was the last"))
            self.decode = None
        effects += [m.ReleaseWorker(worker) for worker in (self.prefill, self.decode) if worker is not None]
        self.prefill = self.decode = None
        return [*effects, m.Conclude(finish=finish)]

    def _end(self, error: ServingError) -> list[m.Effect]:
        return [*self._free_workers(str(error)), m.Conclude(error=error)]

    def _free_workers(self, reason: str) -> list[m.Effect]:
        """Tell everybody who holds, or was asked to hold, the request. An unasked prefill worker is told nothing."""
        freed: list[m.Effect] = []
        if self.prefill is not None:
            is_asked = self.state is not S.RESERVING
            freed.append(m.AbortWork(self.prefill, reason) if is_asked else m.ReleaseWorker(self.prefill))
        if self.decode is not None:
            freed.append(m.AbortWork(self.decode, reason))
        self.prefill = self.decode = None
        return freed
