"""A shell that plays policy and workers at random, and holds the request machine to its promises."""

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.ids import WorkerId
from core.membership import Role
from router import messages as m
from router.lifecycle import EDGES, TERMINAL, RequestState
from tests.fakes.request_life import (
    ABORT,
    BUSIER,
    D1,
    D2,
    END,
    FAILURE,
    LANDED,
    LOST,
    NOBODY,
    P1,
    P2,
    SAMPLES,
    S,
    machine,
    rejected,
    tokens,
)

Making = Callable[[], m.Event]


class Cluster(RuleBasedStateMachine):
    """Every worker answers what it was asked, in any order that two unordered streams allow."""

    def __init__(self) -> None:
        super().__init__()
        self.request = machine(deadline_at=1e9)
        self.now = 0.0
        self.holding: dict[WorkerId, Role] = {}
        self.bound: WorkerId | None = None
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
                case m.SubmitDecode(worker_id):
                    self.hold(worker_id, Role.DECODE)
                    self.next_index = 1
                case m.SubmitPrefill(worker_id, decode):
                    assert decode is None or self.holding[decode] is Role.DECODE
                    self.hold(worker_id, Role.PREFILL)
                    self.bound = decode
                case m.SubmitAlone(worker_id, role):
                    assert not self.holding
                    self.hold(worker_id, role)
                case m.BindPrefill(worker_id, decode):
                    assert self.holding[worker_id] is Role.PREFILL
                    assert self.bound is None, "the KV goes to one worker"
                    assert decode is None or self.holding[decode] is Role.DECODE
                    self.bound = decode
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

    def hold(self, worker_id: WorkerId, role: Role) -> None:
        assert worker_id not in self.holding
        self.holding[worker_id] = role

    @initialize()
    def enter(self) -> None:
        self.feed(m.Queued())

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        state = self.request.state
        if state in TERMINAL:
            return
        if state is S.PREFILLING and data.draw(st.integers(0, 4)) == 0 and not self.request._early:
            self.feed(LANDED)
            self.feed(self.next_token())
        elif self.request._early and state is S.PREFILLING:
            self.feed(m.PrefillProduced(tokens(0)))
        else:
            self.feed(data.draw(st.sampled_from(self.choices()[state]))())

    def choices(self) -> dict[RequestState, list[Making]]:
        refusals: list[Making] = [lambda: m.DecodeRejected(rejected()), lambda: m.DecodeRejected(BUSIER)]
        first: list[Making] = [lambda: m.PrefillProduced(tokens(0)), lambda: m.PrefillFinished(tokens(0), END)]
        decodes: list[Making] = [
            lambda: m.DecodeChosen(self.free_decode()),
            lambda: m.DecodeUnavailable(0.1),
            m.SeekDue,
        ]
        return {
            S.QUEUED: [m.Released],
            S.ROUTING: [
                lambda: m.PairChosen(P1, D1),
                lambda: m.PairChosen(P2, D2),
                lambda: m.LateChosen(P1),
                lambda: m.PrefillAloneChosen(P2),
                lambda: m.DecodeAloneChosen(D2),
                lambda: NOBODY,
            ],
            S.RESERVING: [lambda: m.DecodeAccepted(0), *refusals],
            S.DISPATCHING: [
                lambda: m.PrefillAccepted(0),
                lambda: m.PrefillRejected(rejected()),
                lambda: m.PrefillRejected(BUSIER),
            ],
            S.REROUTING: [lambda: m.PrefillChosen(P2), lambda: NOBODY],
            S.STARTING: [lambda: m.PrefillAccepted(0), lambda: m.PrefillRejected(rejected())],
            S.SEEKING: [*decodes, *first],
            S.BINDING: [lambda: m.DecodeAccepted(0), *refusals, *first],
            S.PREFILLING: [*first, self.cancelled],
            S.HOLDING: [*decodes, m.HoldExpired],
            S.PLACING: [lambda: m.DecodeAccepted(0), *refusals],
            S.HANDING_OVER: [m.KvHandedOver, lambda: LANDED],
            S.DECODING: [self.next_token, self.last_token, m.KvHandedOver, lambda: m.PrefillLost(LOST)],
            S.ENGAGING: [lambda: self.of_lone(m.DecodeAccepted(0), m.PrefillAccepted(0))],
            S.COMPUTING: [lambda: self.of_lone(m.DecodeProduced(tokens(0)), m.PrefillProduced(tokens(0)))],
            S.GENERATING: [self.next_token, self.last_token, lambda: m.PrefillMeasured(0.1, 0.1, 0)],
        }

    def cancelled(self) -> m.Event:
        """The prefill worker ended the transfer, and has told of that already, or is about to."""
        return m.TransferCancelled(LOST) if not self.request._early else m.PrefillLost(LOST)

    def free_decode(self) -> WorkerId:
        return D2 if D1 in self.request._round.refused else D1

    def of_lone(self, by_decode: m.Event, by_prefill: m.Event) -> m.Event:
        return by_decode if self.request.decode is not None else by_prefill

    @rule(is_decode=st.booleans())
    def lose(self, is_decode: bool) -> None:
        worker = self.request.decode if is_decode else self.request.prefill
        event = m.DecodeLost(LOST) if is_decode else m.PrefillLost(LOST)
        if worker in self.holding and type(event) in EDGES[self.request.state]:
            self.feed(event)

    @rule()
    def late_news(self) -> None:
        if self.request.is_over:
            for event in SAMPLES.values():
                self.feed(event)

    @rule(end=st.sampled_from([ABORT, FAILURE]), coin=st.integers(0, 9))
    def end(self, end: m.Event, coin: int) -> None:
        if coin == 0:
            self.feed(end)

    def next_token(self) -> m.Event:
        self.next_index += 1
        new = tokens(self.next_index - 1)
        return m.PrefillProduced(new) if self.request.decode is None else m.DecodeProduced(new)

    def last_token(self) -> m.Event:
        self.next_index += 1
        new = tokens(self.next_index - 1)
        return m.PrefillFinished(new, END) if self.request.decode is None else m.DecodeFinished(new, END)

    @invariant()
    def keeps_its_promises(self) -> None:
        self.request.check()
        assert self.delivered == list(range(len(self.delivered)))
        assert self.concluded == int(self.request.is_over)
        assert not self.request.is_over or not self.holding, "whatever ends it, nobody holds it"
        held = {worker for worker in (self.request.prefill, self.request.decode) if worker is not None}
        assert set(self.holding) <= held
        assert self.request.is_over or len(self.delivered) == self.request.num_tokens


Cluster.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestCluster = Cluster.TestCase
