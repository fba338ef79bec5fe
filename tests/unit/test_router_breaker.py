"""The circuit breaker: its table, rests that double, one probe at a time, evidence of other gateways."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import WorkerId
from router.forwarding.breaker import EDGES, BreakerEvent, BreakerState, CircuitBreakers
from router.forwarding.config import BreakerConfig

W = WorkerId("w")
CONFIG = BreakerConfig(failures=3, open_min_s=1.0, open_max_s=8.0)


class Gate:
    """Who may be sent work."""

    def __init__(self) -> None:
        self.shut: set[WorkerId] = set()
        self.news: list[WorkerId] = []
        self.breakers = CircuitBreakers(CONFIG, random.Random(1), self.tell)
        self.breakers.on_changed = self.news.append

    def tell(self, worker_id: WorkerId, is_shut: bool) -> None:
        assert (worker_id in self.shut) is not is_shut, "told of changes only"
        self.shut ^= {worker_id}

    def trip(self, now: float = 0.0) -> float:
        """Fail until it is open; return when its rest ends."""
        while W not in self.shut:
            self.breakers.failed(W, now)
        until = self.breakers.next_deadline()
        assert until is not None
        return until


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    gate = Gate()
    for _ in range(5):
        gate.breakers.failed(W, 0.0)
        gate.breakers.failed(W, 0.0)
        gate.breakers.proved(W)
    assert (gate.shut, gate.news) == (set(), [])
    for _ in range(3):
        gate.breakers.failed(W, 0.0)
    assert (gate.shut, gate.news) == ({W}, [W])
    assert gate.breakers.state_of(W, 0.0)[0] is BreakerState.OPEN
    gate.breakers.proved(W)
    assert gate.shut == {W}, "work from before the trip proves nothing"


def test_after_its_rest_one_probe_decides() -> None:
    gate = Gate()
    until = gate.trip()
    gate.breakers.poll(until - 0.001)
    assert gate.shut == {W}
    gate.breakers.poll(until)
    assert gate.shut == set()
    gate.breakers.sent(W, "probe")
    assert gate.shut == {W}, "one at a time"
    gate.breakers.proved(W)
    assert gate.shut == set()
    assert list(gate.breakers.not_closed()) == []
    assert gate.breakers.next_deadline() is None


def test_a_probe_that_was_taken_back_leaves_room_for_another() -> None:
    gate = Gate()
    gate.breakers.poll(gate.trip())
    gate.breakers.sent(W, "probe")
    gate.breakers.withdrawn(W, "another work")
    assert gate.shut == {W}
    gate.breakers.withdrawn(W, "probe")
    assert gate.shut == set()
    gate.breakers.sent(W, "next")
    assert gate.shut == {W}


def test_rests_double_up_to_a_bound_with_jitter() -> None:
    gate, now, rests = Gate(), 0.0, []
    until = gate.trip()
    for _ in range(6):
        rests.append(until - now)
        now = until
        gate.breakers.poll(now)
        gate.breakers.sent(W, "probe")
        gate.breakers.failed(W, now)
        until = gate.breakers.next_deadline() or now
    for rest_s, longest_s in zip(rests, (1.0, 2.0, 4.0, 8.0, 8.0, 8.0), strict=True):
        assert longest_s / 2 <= rest_s <= longest_s
    assert len(set(rests)) == len(rests)


def test_another_gateways_trip_and_recovery_are_taken_over_and_not_told_on() -> None:
    gate = Gate()
    gate.breakers.adopt(W, BreakerState.OPEN, 2.0, now=10.0)
    assert (gate.shut, gate.news) == ({W}, [])
    assert gate.breakers.state_of(W, 11.0) == (BreakerState.OPEN, 1.0)
    gate.breakers.adopt(W, BreakerState.CLOSED, 0.0, now=11.0)
    assert (gate.shut, gate.news) == (set(), [])
    gate.breakers.adopt(W, BreakerState.OPEN, 1e9, now=10.0)
    assert gate.breakers.next_deadline() == 18.0, "nobody's word shuts a worker off for ever"
    gate.breakers.adopt(WorkerId("x"), BreakerState.CLOSED, 0.0, now=11.0)
    assert list(gate.breakers.not_closed()) == [W]


def test_a_worker_that_begins_anew_is_trusted() -> None:
    gate = Gate()
    gate.trip()
    gate.breakers.forget(W)
    assert gate.shut == set()
    gate.breakers.forget(W)


@pytest.mark.parametrize("state", list(BreakerState))
def test_the_table_is_complete(state: BreakerState) -> None:
    assert set(EDGES[state]) == set(BreakerEvent)


@given(
    st.lists(
        st.tuples(st.sampled_from(["fail", "prove", "send", "withdraw", "poll", "open", "close"]), st.integers(0, 2))
    )
)
def test_whatever_happens_it_stays_consistent_and_finds_its_way_back(steps: list[tuple[str, int]]) -> None:
    gate, now = Gate(), 0.0
    breakers = gate.breakers
    for step, number in steps:
        now += 0.4
        worker, work = WorkerId(f"w{number}"), f"work {number}"
        match step:
            case "fail":
                breakers.failed(worker, now)
            case "prove":
                breakers.proved(worker)
            case "send":
                breakers.sent(worker, work)
            case "withdraw":
                breakers.withdrawn(worker, work)
            case "open":
                breakers.adopt(worker, BreakerState.OPEN, 3.0, now)
            case "close":
                breakers.adopt(worker, BreakerState.CLOSED, 0.0, now)
            case _:
                breakers.poll(now)
        breakers.check()
    for number in range(3):
        breakers.poll(now + 100.0)
        breakers.sent(WorkerId(f"w{number}"), "last")
        breakers.proved(WorkerId(f"w{number}"))
    breakers.check()
    assert gate.shut == set()
    assert list(breakers.not_closed()) == []
