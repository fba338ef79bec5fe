"""The life of a supervised service: walks, the product of states and events, reachability, random schedules."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.supervision.backoff import BackOffConfig, restart_delay_s
from cluster.supervision.lifecycle import (
    EDGES,
    BecameReady,
    Drain,
    DrainOverdue,
    Effect,
    Ended,
    Event,
    Fence,
    Fenced,
    Kill,
    LifePolicy,
    LifeState,
    RestartDue,
    ServiceLife,
    Start,
    StartAsked,
    StartOverdue,
    StopAsked,
)
from core.errors import InvalidTransition
from core.ids import Epoch
from tests.state_tables import reach

S = LifeState
BACK_OFF = BackOffConfig(base_s=1.0, factor=2.0, max_s=10.0, jitter_ratio=0.5, stable_s=30.0, crash_loop_failures=3)
POLICY = LifePolicy(start_deadline_s=60.0, drain_deadline_s=5.0, back_off=BACK_OFF, close_s=2.0)
EVENTS: list[Callable[[Epoch], Event]] = [
    lambda epoch: StartAsked(),
    lambda epoch: Fenced(Epoch(epoch + 1)),
    lambda epoch: BecameReady(epoch, "host:1"),
    lambda epoch: Ended(epoch, "boom"),
    lambda epoch: StartOverdue(),
    lambda epoch: RestartDue(),
    lambda epoch: StopAsked(),
    lambda epoch: DrainOverdue(),
]
WALKS: dict[LifeState, list[Callable[[Epoch], Event]]] = {
    S.PENDING: [],
    S.STARTING: [EVENTS[0], EVENTS[1]],
    S.READY: [EVENTS[0], EVENTS[1], EVENTS[2]],
    S.FAILED: [EVENTS[0], EVENTS[1], EVENTS[2], EVENTS[3]],
    S.BACKING_OFF: [EVENTS[0], EVENTS[1], EVENTS[3], EVENTS[1]],
    S.DRAINING: [EVENTS[0], EVENTS[1], EVENTS[2], EVENTS[6]],
    S.STOPPED: [EVENTS[6]],
}


def new_life() -> ServiceLife:
    return ServiceLife("w", POLICY, lambda: 0.0)


def life_in(state: LifeState) -> ServiceLife:
    life = new_life()
    for event in WALKS[state]:
        life.handle(event(life.epoch), 0.0)
        life.check()
    assert life.state is state
    return life


def test_walk_from_start_over_a_crash_to_a_clean_stop() -> None:
    life = new_life()
    assert life.handle(StartAsked(), 0.0) == [Fence("")]
    assert life.handle(Fenced(Epoch(7)), 0.1) == [Start(Epoch(7))]
    assert life.next_deadline() == 60.1
    assert life.handle(BecameReady(Epoch(7), "h:1"), 3.0) == []
    assert (life.address, life.next_deadline()) == ("h:1", None)
    assert life.handle(Ended(Epoch(7), "killed"), 10.0) == [Fence("killed")]
    assert (life.state, life.address, life.failures) == (S.FAILED, "", 1)
    assert life.handle(Fenced(Epoch(8)), 10.1) == []
    assert (life.state, life.next_deadline()) == (S.BACKING_OFF, 11.1)
    assert life.expired(11.0) is None
    assert life.expired(11.1) == RestartDue()
    assert life.handle(RestartDue(), 11.1) == [Start(Epoch(8))]
    assert life.restarts == 1
    assert life.handle(BecameReady(Epoch(8), "h:2"), 12.0) == []
    assert life.handle(StopAsked(), 13.0) == [Drain(5.0)]
    assert life.expired(19.9) is None
    assert life.handle(Ended(Epoch(8), "stopped"), 14.0) == []
    assert life.state is S.STOPPED
    assert life.next_deadline() is None


def test_a_start_that_hangs_is_killed_and_tried_again() -> None:
    life = life_in(S.STARTING)
    assert life.expired(60.0) == StartOverdue()
    assert life.handle(StartOverdue(), 60.0) == [Kill("not ready within 60 s"), Fence("not ready within 60 s")]
    assert life.handle(Ended(Epoch(1), "killed"), 60.1) == []
    assert life.cause == "not ready within 60 s", "the death that we caused is not the cause"
    life.handle(Fenced(Epoch(2)), 60.2)
    assert life.state is S.BACKING_OFF


def test_draining_too_long_ends_in_a_kill_once() -> None:
    life = life_in(S.DRAINING)
    assert life.expired(6.9) is None
    assert life.expired(7.0) == DrainOverdue()
    assert life.handle(DrainOverdue(), 7.0) == [Kill("did not stop within 7 s")]
    assert life.next_deadline() is None
    assert life.handle(StopAsked(), 8.0) == []


def test_stopping_a_service_that_starts_kills_it() -> None:
    assert life_in(S.STARTING).handle(StopAsked(), 1.0) == [Kill("stopped while starting")]


@pytest.mark.parametrize("event", [BecameReady(Epoch(1), "old:1"), Ended(Epoch(1), "late")])
@pytest.mark.parametrize("state", [S.BACKING_OFF])
def test_news_of_a_fenced_incarnation_changes_nothing(state: LifeState, event: Event) -> None:
    life = life_in(state)
    assert life.epoch == 2
    assert life.handle(event, 5.0) == []
    assert (life.state, life.cause) == (state, "boom")


def test_failures_in_a_row_grow_the_delay_until_it_was_stable() -> None:
    life = life_in(S.READY)
    now, delays = 0.0, []
    for ready_for_s in (1.0, 1.0, 1.0, 1.0, 1.0, 31.0):
        now += ready_for_s
        life.handle(Ended(life.epoch, "boom"), now)
        life.handle(Fenced(Epoch(life.epoch + 1)), now)
        delays.append((life.next_deadline() or 0.0) - now)
        assert life.is_crash_loop == (life.failures >= 3)
        now = life.next_deadline() or 0.0
        life.handle(RestartDue(), now)
        life.handle(BecameReady(life.epoch, "h:1"), now)
    assert delays == [1.0, 2.0, 4.0, 8.0, 10.0, 1.0]


@pytest.mark.parametrize(
    ("failures", "unit_random", "expected"),
    [(1, 0.0, 1.0), (2, 0.0, 2.0), (1, 0.5, 0.75), (4, 0.0, 8.0), (5, 0.0, 10.0), (500, 0.0, 10.0), (500, 1.0, 5.0)],
)
def test_delay(failures: int, unit_random: float, expected: float) -> None:
    assert restart_delay_s(BACK_OFF, failures, unit_random) == expected


@pytest.mark.parametrize("make", EVENTS, ids=lambda make: type(make(Epoch(0))).__name__)
@pytest.mark.parametrize("state", LifeState)
def test_product_of_states_and_events(state: LifeState, make: Callable[[Epoch], Event]) -> None:
    life = life_in(state)
    event = make(life.epoch)
    before = (life.state, life.epoch, life.address, life.failures, life.next_deadline())
    target = EDGES[state].get(type(event))
    if target is None:
        with pytest.raises(InvalidTransition):
            life.handle(event, 1.0)
        assert (life.state, life.epoch, life.address, life.failures, life.next_deadline()) == before
    else:
        life.handle(event, 1.0)
        assert life.state is target
    life.check()


def test_every_state_is_reachable_and_stopped_is_reachable_from_everywhere() -> None:
    assert reach(EDGES, S.PENDING) == set(LifeState)
    assert all(S.STOPPED in reach(EDGES, state) for state in LifeState)
    assert reach(EDGES, S.STOPPED) == {S.STOPPED}


class World(RuleBasedStateMachine):
    """A supervisor's world: processes that come up, die and hang in any order; fences that answer late."""

    def __init__(self) -> None:
        super().__init__()
        self.life = new_life()
        self.now = 0.0
        self.given = 0
        self.alive: set[Epoch] = set()
        self.fences = 0
        self.perform(self.life.handle(StartAsked(), self.now))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Fence():
                    self.fences += 1
                case Start(epoch):
                    assert not self.alive or min(self.alive) < epoch, "two processes of one epoch"
                    self.alive.add(epoch)
                case Drain() | Kill():
                    pass

    def feed(self, event: Event) -> None:
        self.perform(self.life.handle(event, self.now))

    @rule()
    def fence_answers(self) -> None:
        if self.fences:
            self.fences -= 1
            self.given += 1
            self.feed(Fenced(Epoch(self.given)))

    @rule()
    def comes_up(self) -> None:
        for epoch in self.alive:
            if self.life.state is not S.READY:
                self.feed(BecameReady(epoch, "h:1"))

    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        if self.alive:
            epoch = data.draw(st.sampled_from(sorted(self.alive)))
            self.alive.discard(epoch)
            self.feed(Ended(epoch, "died"))

    @rule(seconds=st.floats(0.0, 100.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        event = self.life.expired(self.now)
        if event is not None:
            self.feed(event)
            assert self.life.expired(self.now) is None or self.life.next_deadline() != self.now

    @rule()
    def is_stopped(self) -> None:
        if self.given > 3:
            self.feed(StopAsked())

    @invariant()
    def holds(self) -> None:
        self.life.check()
        if self.life.state is S.READY:
            assert self.life.epoch in self.alive


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
