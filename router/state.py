"""The machine of one request in the gateway: events in, effects out. Knows no clock, no socket, no policy.

Its states and edges are in `router.lifecycle`. Every attempt to place the request has a number of its own, and so a
work id of its own: a late message of an older attempt names a work that the shell does not know any more. The decode
workers that are asked for one late-bound prompt share its work id; the shell drops what comes from a worker that holds
nothing of the work, and one that was lost is not asked again for this work (its next incarnation may be).
"""

from core.errors import (
    DeadlineExceeded,
    InvalidTransition,
    ProtocolError,
    RejectedError,
    ServingError,
    WorkerLost,
)
from core.ids import RequestId, WorkerId
from core.membership import Role
from core.request import PromptToken, TokenOutput
from router import messages as m
from router.early_news import EarlyNews, check_order
from router.lifecycle import ASKING, EDGES, TERMINAL, RequestState
from router.patience import Patience
from router.round import Round
from router.timeline import Timeline

S = RequestState
_ALONE = frozenset({S.ENGAGING, S.COMPUTING, S.GENERATING})
_NEWS_OF_PREFILL = (m.PrefillAccepted, m.PrefillRejected, m.PrefillProduced, m.PrefillFinished, m.PrefillLost)
_NEWS_OF_DECODE = (m.DecodeAccepted, m.DecodeRejected, m.DecodeProduced, m.DecodeFinished, m.DecodeLost)


class RequestMachine:
    """One request.

    Attributes:
        prefill, decode: the workers that hold, or are being asked to hold, the request now.
        prefill_worker, decode_worker: the workers that served it, as far as it got.
        attempt: number of the reservation (from 0); names the work on the wire.
        num_asked: how many placements were tried, refusals included.
        is_late: the decode worker is, or was, looked for while the prompt was computed.
        is_kept: no decode worker was found, and the prefill worker generates the rest.
        num_tokens: delivered so far; the next token must have this index.
        cached_tokens: prompt tokens that the prefill worker had.
    """

    def __init__(
        self,
        request_id: RequestId,
        *,
        arrived_at: float,
        patience: Patience,
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
        self.is_late = False
        self.is_kept = False
        self.landed: m.KvLanded | None = None
        self.timeline = Timeline(arrived_at)
        self._patience = patience
        self._max_losses = max_losses
        self._num_losses = 0
        self._round = Round()
        self._early = EarlyNews()
        self._num_seeks = 0

    @property
    def is_over(self) -> bool:
        return self.state in TERMINAL

    @property
    def is_too_long(self) -> bool:
        """Everybody who was asked in this round said that the request can never fit."""
        return self._round.is_too_long

    @property
    def was_taken(self) -> bool:
        """Some worker accepted to compute the prompt."""
        return self.prefill_worker is not None or self.decode_worker is not None

    def next_deadline(self) -> float | None:
        """When `poll` has something to do; None once over."""
        return None if self.is_over else self._patience.next_deadline()

    def poll(self, now: float) -> list[m.Effect]:
        """Notice what did not happen in time."""
        if self.is_over:
            return []
        patience = self._patience
        if now >= patience.deadline_at:
            return self.handle(m.RequestFailed(DeadlineExceeded(f"deadline passed while {self.state}")), now)
        if patience.answer_due_at is not None and now >= patience.answer_due_at:
            silent, lost = self._silence()
            return [m.BlameWorker(silent), *self.handle(lost, now)]
        if self.state is S.HOLDING and patience.hold_until is not None and now >= patience.hold_until:
            return self.handle(m.HoldExpired(), now)
        if patience.seek_at is not None and now >= patience.seek_at:
            return self.handle(m.SeekDue(), now)
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
        before = self.state
        if before in _ALONE and type(event) in (_NEWS_OF_PREFILL if self.prefill is None else _NEWS_OF_DECODE):
            raise ProtocolError(f"{type(event).__name__} of a request that no such worker has")
        effects = self._effects(event, now)
        self.state = after
        self._patience.moved(before, after, event, now)
        if after is S.HANDING_OVER:
            for kept in self._early.take():
                effects += self.handle(kept, now)
        return effects

    def check(self) -> None:
        """Assert what must hold between events."""
        assert self.state not in _ALONE or (self.prefill is None) is not (self.decode is None)
        has_decode = self.state in (S.RESERVING, S.BINDING, S.PLACING, S.HANDING_OVER, S.DECODING)
        assert not has_decode or self.decode is not None
        has_prefill = self.state in ASKING - {S.ENGAGING} | {S.SEEKING, S.PREFILLING, S.HOLDING, S.HANDING_OVER}
        assert not has_prefill or self.prefill is not None
        assert self.state not in (S.STARTING, S.SEEKING, S.HOLDING) or self.decode is None
        assert not self._early or self.state in (S.DISPATCHING, S.PREFILLING, *TERMINAL)
        assert self.state not in (S.RECEIVED, S.QUEUED, S.ROUTING) or (self.prefill, self.decode) == (None, None)
        assert not self.is_over or (self.prefill, self.decode) == (None, None)
        assert (self.num_tokens > 0) == (self.timeline.first_token_at is not None)
        has_tokens = self.state in (S.HOLDING, S.PLACING, S.HANDING_OVER, S.DECODING, S.GENERATING)
        assert self.is_over or has_tokens is (self.num_tokens > 0)
        self._patience.check(self.state)
        assert self._num_losses <= self._max_losses or self.is_over

    def _silence(self) -> tuple[WorkerId, m.Event]:
        """Return who should have answered by now, and its loss."""
        is_decode = self.state in (S.RESERVING, S.BINDING, S.PLACING) or self.prefill is None
        silent = self.decode if is_decode else self.prefill
        assert silent is not None, "somebody was asked"
        error = WorkerLost(f"{silent} neither accepted nor rejected within {self._patience.accept_timeout_s:g} s")
        return silent, m.DecodeLost(error) if is_decode else m.PrefillLost(error)

    def _escalated(self, event: m.Event) -> m.Event:
        """A loss that would be retried becomes a failure when there were enough of them."""
        if isinstance(event, m.PrefillLost | m.DecodeLost) and self._num_losses >= self._max_losses:
            return m.RequestFailed(event.error) if EDGES[self.state].get(type(event)) is S.ROUTING else event
        return event

    def _effects(self, event: m.Event, now: float) -> list[m.Effect]:
        """Change everything but the state. Called only for events that have an edge from a living state."""
        match event:
            case m.DecodeProduced(tokens) if self.num_tokens and self.decode is not None:
                return self._deliver(tokens, now)
            case m.Queued() | m.DecodeUnavailable():
                return []
            case m.Released():
                return self._begin_round(now)
            case m.PairChosen(prefill, decode):
                self._begin_attempt(prefill, decode)
                return [m.SubmitDecode(decode, prefill, self.attempt, self._round.is_conditional(Role.DECODE))]
            case m.LateChosen(prefill):
                self._begin_attempt(prefill, None)
                self.is_late = True
                return [m.SubmitPrefill(prefill, None, self.attempt, self._round.is_conditional(Role.PREFILL))]
            case m.PrefillAloneChosen(prefill):
                self._begin_attempt(prefill, None)
                return [m.SubmitAlone(prefill, Role.PREFILL, self.attempt, self._round.is_conditional(Role.PREFILL))]
            case m.DecodeAloneChosen(decode):
                self._begin_attempt(None, decode)
                return [m.SubmitAlone(decode, Role.DECODE, self.attempt, self._round.is_conditional(Role.DECODE))]
            case m.PrefillChosen(prefill):
                self.num_asked += 1
                self.prefill = prefill
                return [m.SubmitPrefill(prefill, self.decode, self.attempt, self._round.is_conditional(Role.PREFILL))]
            case m.DecodeChosen(decode):
                self.num_asked += 1
                self.decode = decode
                return [m.SubmitDecode(decode, None, self.attempt, self._round.is_conditional(Role.DECODE))]
            case m.NothingFits(cause):
                return [
                    *self._free_workers("no prefill worker accepts"),
                    m.ReturnToQueue(cause, self._round.retry_after_s),
                ]
            case m.SeekDue():
                return self._seek_afresh()
            case m.HoldExpired():
                assert self.prefill is not None
                self.is_kept = True
                return [m.BindPrefill(self.prefill, None)]
            case m.DecodeAccepted():
                return self._accepted_by_decode(now)
            case m.PrefillAccepted(cached_tokens):
                return self._accepted_by_prefill(cached_tokens, now)
            case m.DecodeRejected(error):
                return self._refused_by_decode(error)
            case m.PrefillRejected(error):
                return self._refused_by_prefill(error)
            case m.KvLanded() | m.DecodeProduced() | m.DecodeFinished() | m.TransferCancelled() if self._overtakes:
                self._keep(event)
                return []
            case m.PrefillProduced() | m.DecodeProduced():
                return self._produced(event, now)
            case m.PrefillFinished() | m.DecodeFinished():
                return self._finish(event, now)
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
                return self._lost(event, error)
            case m.RequestFailed(error) | m.AbortRequested(error) | m.TransferCancelled(error):
                return [*self._free_workers(str(error)), m.Conclude(error=error)]
            case _:
                raise AssertionError(f"{type(event).__name__} has an edge but no effect")

    @property
    def _overtakes(self) -> bool:
        """News of the decode worker come before the first token of the prefill worker."""
        return self.state in (S.DISPATCHING, S.PREFILLING)

    def _begin_round(self, now: float) -> list[m.Effect]:
        self._round = Round()
        self.timeline.dispatched(now)
        return [m.ChooseWorkers(frozenset())]

    def _begin_attempt(self, prefill: WorkerId | None, decode: WorkerId | None) -> None:
        self.attempt += 1
        self.num_asked += 1
        self.prefill, self.decode = prefill, decode
        self.is_late = False

    def _accepted_by_decode(self, now: float) -> list[m.Effect]:
        assert self.decode is not None or self.state is S.ENGAGING
        if self.state is S.ENGAGING:
            self.decode_worker = self.decode
            self.timeline.accepted(now)
            return [m.LeaveQueue()]
        assert self.prefill is not None
        if self.state is S.RESERVING:
            return [m.SubmitPrefill(self.prefill, self.decode, self.attempt, self._round.is_conditional(Role.PREFILL))]
        return [m.BindPrefill(self.prefill, self.decode)]

    def _accepted_by_prefill(self, cached_tokens: int, now: float) -> list[m.Effect]:
        self.cached_tokens = cached_tokens
        self.prefill_worker = self.prefill
        self.timeline.accepted(now)
        if self.state is not S.STARTING:
            return [m.LeaveQueue()]
        return [m.LeaveQueue(), *self._seek_afresh()]

    def _refused_by_decode(self, error: RejectedError) -> list[m.Effect]:
        assert self.decode is not None
        refuser = self.decode
        self._round.refuse(refuser, Role.DECODE, error)
        if self.state in (S.BINDING, S.PLACING):
            self.decode = None
            return [m.ReleaseWorker(refuser), self._seek()]
        return [*self._release_all(), m.ChooseWorkers(self._round.refused)]

    def _refused_by_prefill(self, error: RejectedError) -> list[m.Effect]:
        assert self.prefill is not None
        refuser = self.prefill
        self._round.refuse(refuser, Role.PREFILL, error)
        if self.state is not S.DISPATCHING:
            return [*self._release_all(), m.ChooseWorkers(self._round.refused)]
        assert self.decode is not None
        self.prefill = None
        self._early = EarlyNews()
        return [m.ReleaseWorker(refuser), m.ChoosePrefill(self._round.refused, self.decode)]

    def _seek_afresh(self) -> list[m.Effect]:
        """Look for a decode worker among all but those that were lost."""
        self._round.ask_afresh(Role.DECODE)
        seek = self._seek()
        self._num_seeks += 1
        return [seek]

    def _seek(self) -> m.ChooseDecode:
        assert self.prefill is not None
        return m.ChooseDecode(self._round.refused, self.prefill, self._num_seeks)

    def _lost(self, event: m.Event, error: ServingError) -> list[m.Effect]:
        is_decode = isinstance(event, m.DecodeLost)
        if self.state is S.DECODING:  # the prefill worker: it holds nothing of the request any more
            return [] if not is_decode else [*self._free_workers(str(error)), m.Conclude(error=error)]
        culprit = self.decode if is_decode else self.prefill
        if is_decode and self.state in (S.BINDING, S.PLACING) and culprit is not None:
            self.decode = None
            self._round.lose(culprit)
            return [m.AbortWork(culprit, str(error)), self._seek()]
        if self.num_tokens:
            return [*self._free_workers(str(error)), m.Conclude(error=error)]
        self._num_losses += 1
        self._early = EarlyNews()
        if culprit is not None:
            self._round.lose(culprit)
        return [
            *self._free_workers(f"retry elsewhere: {error}"),
            m.ChooseWorkers(self._round.refused),
        ]

    def _keep(self, event: m.EarlyEvent) -> None:
        if self.decode is None:
            raise ProtocolError(f"{type(event).__name__} of a request that no decode worker has")
        self._early.keep(event)

    def _release_prefill(self) -> list[m.Effect]:
        released, self.prefill = self.prefill, None
        return [m.ReleaseWorker(released)] if released is not None else []

    def _deliver(
        self, tokens: tuple[TokenOutput, ...], now: float, prompt_tokens: tuple[PromptToken, ...] = ()
    ) -> list[m.Effect]:
        check_order(tokens, first=self.num_tokens)
        self.num_tokens += len(tokens)
        if tokens:
            self.timeline.tokens_arrived(now)
        return [m.Deliver(tokens, prompt_tokens)] if tokens else []

    def _produced(self, event: m.PrefillProduced | m.DecodeProduced, now: float) -> list[m.Effect]:
        """Tokens of the worker whose turn it is."""
        tokens = event.tokens
        if not tokens and not self.num_tokens:
            raise ProtocolError("a worker told of a first token and sent none")
        if self._early.has_tokens and len(tokens) != 1:
            raise ProtocolError("both workers produced the same token")
        return self._deliver(tokens, now, event.prompt_tokens)

    def _finish(self, event: m.PrefillFinished | m.DecodeFinished, now: float) -> list[m.Effect]:
        effects = self._deliver(event.tokens, now, event.prompt_tokens)
        if isinstance(event, m.PrefillFinished) and self.decode is not None:
            effects.append(m.AbortWork(self.decode, "the first token was the last"))
            self.decode = None
        return [*effects, *self._release_all(), m.Conclude(finish=event.finish)]

    def _release_all(self) -> list[m.Effect]:
        released = [m.ReleaseWorker(worker) for worker in (self.prefill, self.decode) if worker is not None]
        self.prefill = self.decode = None
        return list(released)

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
