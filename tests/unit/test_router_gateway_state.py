"""What a gateway shares, in its real parts: two gateways tell each other through messages alone."""

import random

from core.clock import ManualClock
from core.ids import Epoch, GatewayId, WorkerId
from router.forwarding.affinity import SessionAffinity
from router.forwarding.breaker import BreakerState, CircuitBreakers
from router.forwarding.config import AffinityConfig, BreakerConfig
from router.replicas.aborts import AbortRounds
from router.replicas.draft import Draft
from router.replicas.gateway_state import GatewayState
from router.replicas.news import BreakerNews, CreditNews
from router.replicas.peers import PeerBook
from router.routing.table import Credit
from tests.routing_world import World, load_report, record

P0, P1, D0 = WorkerId("p0"), WorkerId("p1"), WorkerId("d0")


class Side:
    """One gateway: its parts, what it will tell, and what it has heard."""

    def __init__(self, name: str, clock: ManualClock) -> None:
        self.world = World("p0", "p1", "d0")
        self.affinity = SessionAffinity(AffinityConfig())
        self.breakers = CircuitBreakers(BreakerConfig(failures=1), random.Random(1), self.world.table.set_breaker)
        self.clock = clock
        self.epochs = dict.fromkeys((P0, P1, D0), Epoch(1))
        self.state = GatewayState(
            self.world.credit, self.world.table, self.affinity, self.breakers, clock, epoch_of=self.epochs.get
        )
        self.book = PeerBook(3.0)
        self.draft = Draft(GatewayId(name), self.state, AbortRounds(lambda *_: False), bindings_per_message=10)
        self.state.tell(self.draft)

    def hear(self, other: "Side", *, is_whole: bool = False) -> None:
        """Take what the other one has to tell."""
        news = other.draft.compose(is_whole=is_whole)
        for worker_id in self.book.absorb(news, self.clock.now()) or ():
            self.state.set_peer_credit(self.book.credit(worker_id))
        for credit in news.credits:
            if credit.load is not None:
                self.state.adopt_load(credit.worker_id, credit.epoch, credit.load)
        for binding in news.bindings:
            self.state.adopt_binding(binding)
        for breaker in news.breakers:
            self.state.adopt_breaker(breaker)

    def peer_credit(self, worker_id: WorkerId) -> Credit:
        row = self.world.table.row(worker_id)
        assert row is not None
        return row.peer_credit


def pair() -> tuple[Side, Side, ManualClock]:
    clock = ManualClock(1000.0)
    return Side("gw-a", clock), Side("gw-b", clock), clock


def test_a_placement_here_is_credit_there_until_a_report_includes_it() -> None:
    a, b, _ = pair()
    decision = a.world.place()
    a.world.credit.place("w", decision, 1000.0)
    assert decision.prefill is not None
    b.hear(a)
    assert b.peer_credit(decision.prefill) == a.world.credit.of(decision.prefill)
    assert b.peer_credit(decision.prefill).prefill_tokens == 1000
    assert b.world.place().prefill not in (None, decision.prefill), "it counts as load"
    load = load_report(5, queued_prefill_tokens=1000, num_running=1)
    a.world.credit.accepted(decision.prefill, "w")
    a.world.table.report(decision.prefill, load, 1000.0)
    a.world.credit.reported(decision.prefill)
    b.hear(a)
    row = b.world.table.row(decision.prefill)
    assert row is not None
    assert (row.peer_credit.num_requests, row.load) == (0, load), "the worker's answer to one is known to both"
    assert b.world.place().prefill not in (None, decision.prefill)


def test_what_is_of_another_incarnation_is_not_taken() -> None:
    a, b, _ = pair()
    b.world.join(record("p0", epoch=Epoch(2)))
    b.epochs[P0] = Epoch(2)
    b.state.set_peer_credit(CreditNews(P0, Epoch(1), 3, 300, 300, 1.0))
    b.state.adopt_load(P0, Epoch(1), load_report(99, num_running=7))
    b.state.adopt_breaker(BreakerNews(P0, Epoch(1), "open", 9.0))
    row = b.world.table.row(P0)
    assert row is not None
    assert (row.peer_credit.num_requests, row.load.num_running, row.breaker_open) == (0, 0, False)
    b.state.set_peer_credit(CreditNews(P0, Epoch(2), 3, 300, 300, 1.0))
    assert b.peer_credit(P0).num_requests == 3
    b.state.set_peer_credit(CreditNews(P0, Epoch(0)))  # nobody tells of it any more
    assert b.peer_credit(P0).num_requests == 0
    a.state.set_peer_credit(CreditNews(WorkerId("unknown"), Epoch(1), 3))


def test_a_trip_is_heard_and_not_echoed() -> None:
    a, b, clock = pair()
    a.breakers.failed(P0, clock.now())
    b.hear(a)
    assert b.breakers.state_of(P0, clock.now())[0] is BreakerState.OPEN
    assert not b.draft.compose(is_whole=True).breakers, "what was only heard is not told on"
    assert [one.worker_id for one in a.draft.compose(is_whole=True).breakers] == [P0]
    clock.advance(60.0)
    for side in (a, b):
        side.breakers.poll(clock.now())
        assert side.breakers.state_of(P0, clock.now())[0] is BreakerState.HALF_OPEN
    a.breakers.proved(P0)
    b.hear(a)
    assert b.breakers.state_of(P0, clock.now())[0] is BreakerState.CLOSED
    assert not a.draft.compose(is_whole=True).breakers


def test_an_unknown_state_of_a_breaker_is_passed_over() -> None:
    _, b, clock = pair()
    b.state.adopt_breaker(BreakerNews(P0, Epoch(1), "ajar", 9.0))
    assert b.breakers.state_of(P0, clock.now())[0] is BreakerState.CLOSED


def test_a_session_is_known_there_for_as_long_as_here() -> None:
    a, b, clock = pair()
    a.affinity.bind("s", P0, D0, clock.now())
    clock.advance(100.0)
    b.hear(a)
    bound = b.affinity.of("s", clock.now())
    assert bound is not None
    assert (bound.prefill, bound.decode) == (P0, D0)
    assert bound.expires_at == clock.now() + 500.0
    assert b.draft.is_empty, "what was only heard is no change"
    c = Side("gw-c", clock)
    c.hear(b, is_whole=True)
    assert c.affinity.of("s", clock.now()) == bound, "but whoever starts may learn it from anybody"
    clock.advance(501.0)
    assert a.state.binding("s") is None
    assert a.state.sessions() == []
