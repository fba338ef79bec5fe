"""The request machine: walks, the product of states and events, reachability, and a stateful search."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.errors import (
    Aborted,
    DeadlineExceeded,
    InvalidTransition,
    ProtocolError,
    RejectedError,
    RejectReason,
    ServingError,
    WorkerLost,
)
from core.ids import RequestId, WorkerId
from core.membership import Role
from core.request import Finish, FinishReason, TokenOutput
from router import messages as m
from router.cost import Candidate, CostTerms
from router.policy import Decision, NoCandidate, Obstacle, PickReason
from router.state import ALL_EVENTS, EDGES, TERMINAL, RequestMachine, RequestState

S = RequestState
P1, P2, D1, D2 = (WorkerId(name) for name in ("p1", "p2", "d1", "d2"))
END = Finish(FinishReason.LENGTH)
LOST = WorkerLost("gone")


def machine(**changes: float) -> RequestMachine:
    settings = {"deadline_at": 100.0, "accept_timeout_s": 2.0, **changes}
    return RequestMachine(
        RequestId("r"),
        arrived_at=0.0,
        deadline_at=settings["deadline_at"],
        accept_timeout_s=settings["accept_timeout_s"],
        max_losses=int(settings.get("max_losses", 2)),
    )


def decision(prefill: WorkerId = P1, decode: WorkerId | None = D1) -> Decision:
    winner = Candidate(prefill, decode, CostTerms(0.0, 1.0))
    return Decision(winner, PickReason.CHEAPEST, (winner,), 0.0)


def tokens(*indices: int) -> tuple[TokenOutput, ...]:
    return tuple(TokenOutput(index, 7) for index in indices)


def rejected(reason: RejectReason = RejectReason.QUEUE_FULL, retry_after_s: float = 0.0) -> RejectedError:
    return RejectedError(reason, "", retry_after_s)


LANDED = m.KvLanded(0.1, 0.2, 0, 10, 1000, "none", kv_lossless=True, kv_wire_bytes=1100)
NOBODY = m.NothingFits(NoCandidate(Role.DECODE, Obstacle.REFUSED))
SAMPLES: dict[type[m.Event], m.Event] = {
    type(event): event
    for event in (
        m.Queued(),
        m.Released(),
        m.PairChosen(decision()),
        m.PrefillChosen(decision(decode=None)),
        NOBODY,
        m.DecodeAccepted(0),
        m.DecodeRejected(rejected()),
        m.PrefillAccepted(3),
        m.PrefillRejected(rejected()),
        m.PrefillProduced(tokens(0)),
        m.PrefillFinished(tokens(0), END),
        m.PrefillMeasured(0.1, 0.2, 4),
        m.KvHandedOver(),
        LANDED,
        m.DecodeProduced(tokens(1)),
        m.DecodeFinished(tokens(1), END),
        m.PrefillLost(LOST),
        m.DecodeLost(LOST),
        m.RequestFailed(ServingError("no")),
        m.AbortRequested(Aborted("enough")),
    )
}
TO: dict[RequestState, Sequence[m.Event]] = {
    S.RECEIVED: (),
    S.QUEUED: (m.Queued(),),
    S.ROUTING: (m.Queued(), m.Released()),
    S.RESERVING: (m.Queued(), m.Released(), m.PairChosen(decision())),
}
TO[S.DISPATCHING] = (*TO[S.RESERVING], m.DecodeAccepted(0))
TO[S.REROUTING] = (*TO[S.DISPATCHING], m.PrefillRejected(rejected()))
TO[S.PREFILLING] = (*TO[S.DISPATCHING], m.PrefillAccepted(3))
TO[S.HANDING_OVER] = (*TO[S.PREFILLING], m.PrefillProduced(tokens(0)))
TO[S.DECODING] = (*TO[S.HANDING_OVER], LANDED)
TO[S.FINISHED] = (*TO[S.DECODING], m.DecodeFinished(tokens(1), END))
TO[S.FAILED] = (*TO[S.PREFILLING], m.RequestFailed(ServingError("no")))
TO[S.ABORTED] = (*TO[S.PREFILLING], m.AbortRequested(Aborted("enough")))


def walk(*events: m.Event, start: RequestMachine | None = None) -> tuple[RequestMachine, list[m.Effect]]:
    """Feed events one second apart; return the machine and the last event's effects."""
    request = start or machine()
    effects: list[m.Effect] = []
    for now, event in enumerate(events):
        effects = request.handle(event, float(now))
        request.check()
    return request, effects


def at(state: RequestState) -> RequestMachine:
    request, _ = walk(*TO[state])
    assert request.state is state
    return request


def facts(request: RequestMachine) -> dict[str, object]:
    return {name: repr(value) for name, value in vars(request).items() if name != "timeline"} | vars(request.timeline)


def test_a_good_life() -> None:
    request = machine()
    steps: list[tuple[m.Event, RequestState, list[m.Effect]]] = [
        (m.Queued(), S.QUEUED, []),
        (m.Released(), S.ROUTING, [m.ChoosePair(frozenset())]),
        (m.PairChosen(decision()), S.RESERVING, [m.SubmitDecode(D1, P1, 0)]),
        (m.DecodeAccepted(0), S.DISPATCHING, [m.SubmitPrefill(P1, D1, 0)]),
        (m.PrefillAccepted(3), S.PREFILLING, [m.LeaveQueue()]),
        (m.PrefillProduced(tokens(0)), S.HANDING_OVER, [m.Deliver(tokens(0))]),
        (m.PrefillMeasured(0.1, 0.2, 4), S.HANDING_OVER, []),
        (m.KvHandedOver(), S.DECODING, [m.ReleaseWorker(P1)]),
        (LANDED, S.DECODING, []),
        (m.DecodeProduced(tokens(1, 2)), S.DECODING, [m.Deliver(tokens(1, 2))]),
        (m.PrefillLost(LOST), S.DECODING, []),
        (
            m.DecodeFinished(tokens(3), END),
            S.FINISHED,
            [m.Deliver(tokens(3)), m.ReleaseWorker(D1), m.Conclude(finish=END)],
        ),
    ]
    for now, (event, state, effects) in enumerate(steps):
        assert request.handle(event, float(now)) == effects
        assert request.state is state
        request.check()
    assert (request.num_tokens, request.cached_tokens, request.num_asked) == (4, 4, 1)
    assert (request.prefill_worker, request.decode_worker, request.landed) == (P1, D1, LANDED)
    split = request.timeline.split(4, 20.0)
    assert (split.queue_s, split.route_s, split.prefill_s, split.ttft_s, split.total_s) == (1.0, 3.0, 1.0, 5.0, 20.0)
    assert split.tpot_s == pytest.approx((11.0 - 5.0) / 3)


def test_a_request_of_one_token_never_meets_a_decode_worker() -> None:
    request, effects = walk(m.Queued(), m.Released(), m.PrefillChosen(decision(decode=None)))
    assert (request.state, effects) == (S.DISPATCHING, [m.SubmitPrefill(P1, None, 0)])
    request, effects = walk(m.PrefillAccepted(0), m.PrefillFinished(tokens(0), END), start=request)
    assert effects == [m.Deliver(tokens(0)), m.ReleaseWorker(P1), m.Conclude(finish=END)]
    assert request.decode_worker is None


def test_a_first_token_that_ends_the_request_frees_the_decode_worker() -> None:
    _, effects = walk(*TO[S.PREFILLING], m.PrefillFinished(tokens(0), END))
    assert effects == [
        m.Deliver(tokens(0)),
        m.AbortWork(D1, "the first token was the last"),
        m.ReleaseWorker(P1),
        m.Conclude(finish=END),
    ]


def test_a_refusal_asks_others_and_remembers_who_refused() -> None:
    request, effects = walk(*TO[S.RESERVING], m.DecodeRejected(rejected()))
    assert effects == [m.ReleaseWorker(P1), m.ReleaseWorker(D1), m.ChoosePair(frozenset({D1}))]
    request, effects = walk(m.PairChosen(decision(P1, D2)), m.DecodeAccepted(0), start=request)
    assert effects == [m.SubmitPrefill(P1, D2, 1)], "another reservation, another attempt"
    request, effects = walk(m.PrefillRejected(rejected()), start=request)
    assert effects == [m.ReleaseWorker(P1), m.ChoosePrefill(frozenset({D1, P1}), D2)]
    request, effects = walk(m.PrefillChosen(decision(P2, D2)), start=request)
    assert effects == [m.SubmitPrefill(P2, D2, 1)], "the reservation and its transfer id stay"
    assert request.num_asked == 3


def test_with_nobody_left_it_waits_with_the_longest_hint_and_starts_afresh() -> None:
    request, _ = walk(*TO[S.RESERVING], m.DecodeRejected(rejected(retry_after_s=0.5)))
    request, effects = walk(NOBODY, start=request)
    assert effects == [m.ReturnToQueue("decode: refused", 0.5)]
    request, effects = walk(m.Released(), start=request)
    assert effects == [m.ChoosePair(frozenset())], "who refused a while ago may accept now"


def test_with_no_prefill_worker_left_the_reservation_is_given_back() -> None:
    request, effects = walk(*TO[S.REROUTING], NOBODY)
    assert request.state is S.QUEUED
    assert isinstance(effects[0], m.AbortWork)
    assert effects[0].worker_id == D1


@pytest.mark.parametrize("state", [S.DISPATCHING, S.PREFILLING])
@pytest.mark.parametrize(("event", "culprit"), [(m.PrefillLost(LOST), P1), (m.DecodeLost(LOST), D1)])
def test_a_worker_lost_before_the_first_token_costs_an_attempt(
    state: RequestState, event: m.Event, culprit: WorkerId
) -> None:
    request, effects = walk(*TO[state], event)
    assert request.state is S.ROUTING
    assert [type(effect) for effect in effects] == [m.AbortWork, m.AbortWork, m.ChoosePair]
    assert effects[-1] == m.ChoosePair(frozenset({culprit}))


def test_losses_are_bounded() -> None:
    request = machine(max_losses=1)
    walk(*TO[S.PREFILLING], m.PrefillLost(LOST), start=request)
    _, effects = walk(
        m.PairChosen(decision(P2, D1)), m.DecodeAccepted(0), m.PrefillLost(WorkerLost("again")), start=request
    )
    assert request.state is S.FAILED
    assert isinstance(effects[-1], m.Conclude)
    assert str(effects[-1].error) == "again"


@pytest.mark.parametrize(
    ("state", "event", "freed"),
    [
        (S.HANDING_OVER, m.PrefillLost(LOST), [P1, D1]),
        (S.HANDING_OVER, m.DecodeLost(LOST), [P1, D1]),
        (S.DECODING, m.DecodeLost(LOST), [D1]),
    ],
)
def test_a_worker_lost_after_the_first_token_ends_the_request(
    state: RequestState, event: m.Event, freed: list[WorkerId]
) -> None:
    request, effects = walk(*TO[state], event)
    assert request.state is S.FAILED
    assert [effect.worker_id for effect in effects if isinstance(effect, m.AbortWork)] == freed
    assert effects[-1] == m.Conclude(error=LOST)


@pytest.mark.parametrize("early", [S.DISPATCHING, S.PREFILLING])
def test_news_that_overtakes_the_first_token_waits_for_it(early: RequestState) -> None:
    request = at(early)
    walk(LANDED, m.DecodeProduced(tokens(1)), m.DecodeFinished(tokens(2), END), start=request)
    assert request.state is early
    if early is S.DISPATCHING:
        walk(m.PrefillAccepted(0), start=request)
    _, effects = walk(m.PrefillProduced(tokens(0)), start=request)
    assert [effect.tokens for effect in effects if isinstance(effect, m.Deliver)] == [tokens(0), tokens(1), tokens(2)]
    assert effects[-1] == m.Conclude(finish=END)
    assert request.state is S.FINISHED


def test_early_news_of_a_lost_attempt_is_forgotten() -> None:
    request = at(S.PREFILLING)
    walk(LANDED, m.DecodeProduced(tokens(1)), m.PrefillLost(LOST), start=request)
    again = (m.PairChosen(decision(P2, D2)), m.DecodeAccepted(0), m.PrefillAccepted(0))
    _, effects = walk(*again, m.PrefillProduced(tokens(0)), start=request)
    assert effects == [m.Deliver(tokens(0))]
    assert request.state is S.HANDING_OVER


BROKEN: list[tuple[str, RequestState, m.Event]] = [
    ("gap", S.DECODING, m.DecodeProduced(tokens(2))),
    ("repeat", S.DECODING, m.DecodeProduced(tokens(0))),
    ("gap-inside", S.DECODING, m.DecodeProduced(tokens(1, 3))),
    ("first-is-not-0", S.PREFILLING, m.PrefillProduced(tokens(1))),
    ("nothing-produced", S.PREFILLING, m.PrefillProduced(())),
    ("end-with-a-gap", S.DECODING, m.DecodeFinished(tokens(5), END)),
    ("early-tokens-before-the-landing", S.PREFILLING, m.DecodeProduced(tokens(1))),
]


@pytest.mark.parametrize(("state", "event"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_token_streams_are_refused_and_change_nothing(state: RequestState, event: m.Event) -> None:
    request = at(state)
    before = facts(request)
    with pytest.raises(ProtocolError):
        request.handle(event, 50.0)
    assert facts(request) == before


def test_early_tokens_are_checked_when_they_come() -> None:
    request = at(S.PREFILLING)
    walk(LANDED, start=request)
    for event in (m.DecodeProduced(tokens(2)), LANDED):
        with pytest.raises(ProtocolError):
            request.handle(event, 9.0)


def test_a_first_delivery_that_early_tokens_do_not_follow_changes_nothing() -> None:
    request = at(S.PREFILLING)
    walk(LANDED, m.DecodeProduced(tokens(1)), start=request)
    before = facts(request)
    with pytest.raises(ProtocolError):
        request.handle(m.PrefillProduced(tokens(0, 1)), 9.0)
    assert facts(request) == before
    _, effects = walk(m.RequestFailed(LOST), start=request)
    assert [effect.worker_id for effect in effects if isinstance(effect, m.AbortWork)] == [P1, D1]


@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("kind", ALL_EVENTS, ids=lambda kind: kind.__name__)
def test_every_state_and_event_has_an_edge_or_is_refused(state: RequestState, kind: type[m.Event]) -> None:
    request = at(state)
    before = facts(request)
    expected = EDGES[state].get(kind)
    if expected is None:
        with pytest.raises(InvalidTransition):
            request.handle(SAMPLES[kind], 50.0)
        assert facts(request) == before
        return
    if state is S.PREFILLING and kind in (m.DecodeProduced, m.DecodeFinished):
        walk(LANDED, start=request)
    if state is S.DISPATCHING and kind in (m.DecodeProduced, m.DecodeFinished):
        walk(LANDED, start=request)
    request.handle(SAMPLES[kind], 50.0)
    request.check()
    assert request.state is expected


def test_samples_and_table_are_complete() -> None:
    assert set(SAMPLES) == set(ALL_EVENTS)
    assert set(EDGES) == set(S)
    assert set(TO) == set(S)


def test_every_state_is_reachable_and_every_living_state_can_end() -> None:
    seen, frontier = {S.RECEIVED}, [S.RECEIVED]
    while frontier:
        for following in EDGES[frontier.pop()].values():
            if following not in seen:
                seen.add(following)
                frontier.append(following)
    assert seen == set(S)
    for state in set(S) - TERMINAL:
        assert {S.FAILED, S.ABORTED} <= set(EDGES[state].values())


@pytest.mark.parametrize("state", sorted(set(S) - TERMINAL))
@pytest.mark.parametrize("end", [m.RequestFailed(ServingError("no")), m.AbortRequested(Aborted("enough"))])
def test_an_early_end_frees_exactly_the_workers_that_were_asked(state: RequestState, end: m.Event) -> None:
    _, effects = walk(*TO[state], end)
    freed = {effect.worker_id for effect in effects if isinstance(effect, m.AbortWork)}
    assert freed == {
        S.RESERVING: {D1},
        S.DISPATCHING: {P1, D1},
        S.REROUTING: {D1},
        S.PREFILLING: {P1, D1},
        S.HANDING_OVER: {P1, D1},
        S.DECODING: {D1},
    }.get(state, set())
    assert isinstance(effects[-1], m.Conclude)


def test_the_deadline_ends_it_from_anywhere() -> None:
    for state in set(S) - TERMINAL:
        request = at(state)
        assert request.poll(99.0) == [] or state in (S.RESERVING, S.DISPATCHING)
        request = at(state)
        effects = request.poll(100.0)
        assert isinstance(effects[-1], m.Conclude)
        assert isinstance(effects[-1].error, DeadlineExceeded)
        assert request.next_deadline() is None
        assert request.poll(200.0) == []


@pytest.mark.parametrize(("state", "silent"), [(S.RESERVING, D1), (S.DISPATCHING, P1)])
def test_a_worker_that_does_not_answer_in_time_is_lost(state: RequestState, silent: WorkerId) -> None:
    request = at(state)
    due = request.next_deadline()
    assert due is not None
    assert due == len(TO[state]) - 1 + 2.0
    assert request.poll(due - 0.01) == []
    effects = request.poll(due)
    assert effects[-1] == m.ChoosePair(frozenset({silent}))
    assert request.next_deadline() == 100.0


def test_too_long_is_told_from_busy() -> None:
    request, _ = walk(*TO[S.RESERVING], m.DecodeRejected(rejected(RejectReason.TOO_LONG)))
    assert request.is_too_long
    request, _ = walk(m.PairChosen(decision(P1, D2)), m.DecodeRejected(rejected()), start=request)
    assert not request.is_too_long


class Cluster(RuleBasedStateMachine):
    """A shell that plays policy and workers at random, and holds the machine to its promises."""

    def __init__(self) -> None:
        super().__init__()
        self.request = machine(deadline_at=1e9)
        self.now = 0.0
        self.holding: dict[WorkerId, str] = {}
        self.delivered: list[int] = []
        self.concluded = 0
        self.next_index = 1

    def feed(self, event: m.Event) -> None:
        self.now += 0.01
        self.perform(self.request.handle(event, self.now))

    def perform(self, effects: list[m.Effect]) -> None:
        for effect in effects:
            assert not self.concluded, "nothing after the conclusion"
            match effect:
                case m.SubmitDecode(worker_id, _, _):
                    assert worker_id not in self.holding
                    self.holding[worker_id] = "decode"
                    self.next_index = 1
                case m.SubmitPrefill(worker_id, decode, _):
                    assert worker_id not in self.holding
                    assert decode is None or self.holding[decode] == "decode"
                    self.holding[worker_id] = "prefill"
                case m.AbortWork(worker_id):
                    del self.holding[worker_id]
                case m.ReleaseWorker(worker_id):
                    self.holding.pop(worker_id, None)
                case m.Deliver(new):
                    self.delivered.extend(token.index for token in new)
                case m.Conclude():
                    self.concluded += 1
                case _:
                    pass

    @initialize()
    def enter(self) -> None:
        self.feed(m.Queued())

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        state = self.request.state
        choices: dict[RequestState, list[Callable[[], m.Event]]] = {
            S.QUEUED: [m.Released],
            S.ROUTING: [lambda: m.PairChosen(decision()), lambda: m.PairChosen(decision(P2, D2)), lambda: NOBODY],
            S.RESERVING: [lambda: m.DecodeAccepted(0), lambda: m.DecodeRejected(rejected())],
            S.DISPATCHING: [lambda: m.PrefillAccepted(0), lambda: m.PrefillRejected(rejected())],
            S.REROUTING: [lambda: m.PrefillChosen(decision(P2, None)), lambda: NOBODY],
            S.PREFILLING: [
                lambda: m.PrefillProduced(tokens(0)),
                lambda: m.PrefillFinished(tokens(0), END),
            ],
            S.HANDING_OVER: [m.KvHandedOver, lambda: LANDED],
            S.DECODING: [self.produce, self.finish, m.KvHandedOver, lambda: m.PrefillLost(LOST)],
        }
        if state not in TERMINAL:
            early = self.request.landed is None and state in (S.DISPATCHING, S.PREFILLING) and self.next_index == 1
            if early and state is S.PREFILLING and data.draw(st.integers(0, 4)) == 0 and not self.request._early:
                self.feed(LANDED)
                self.feed(self.produce())
                return
            if self.request._early:
                self.feed(m.PrefillProduced(tokens(0)))
                return
            self.feed(data.draw(st.sampled_from(choices[state]))())

    @rule(which=st.booleans())
    def lose(self, which: bool) -> None:
        event = m.DecodeLost(LOST) if which else m.PrefillLost(LOST)
        if type(event) in EDGES[self.request.state]:
            self.feed(event)

    @rule()
    def late_news(self) -> None:
        if self.request.is_over:
            for event in SAMPLES.values():
                self.feed(event)

    @rule(
        end=st.sampled_from([m.AbortRequested(Aborted("x")), m.RequestFailed(ServingError("x"))]),
        coin=st.integers(0, 9),
    )
    def end(self, end: m.Event, coin: int) -> None:
        if coin == 0:
            self.feed(end)

    def produce(self) -> m.Event:
        self.next_index += 1
        return m.DecodeProduced(tokens(self.next_index - 1))

    def finish(self) -> m.Event:
        self.next_index += 1
        return m.DecodeFinished(tokens(self.next_index - 1), END)

    @invariant()
    def keeps_its_promises(self) -> None:
        self.request.check()
        assert self.delivered == list(range(len(self.delivered)))
        assert self.concluded == int(self.request.is_over)
        assert not self.request.is_over or not self.holding, "whatever ends it, nobody holds it"
        held = {worker for worker in (self.request.prefill, self.request.decode) if worker is not None}
        assert set(self.holding) <= held


Cluster.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCluster = Cluster.TestCase
