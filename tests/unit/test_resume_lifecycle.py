"""The states of a resumable stream: every edge, every event in every state, and nothing lost on the way."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidTransition
from router.resume import lifecycle as life
from router.resume.lifecycle import ALL_EVENTS, EDGES, StreamLife, StreamState
from tests.state_tables import reach

S = StreamState
WINDOW_S = 10.0
_MADE: list[life.Event] = [
    life.FollowerCame(),
    life.LastFollowerLeft(),
    life.ReadElsewhere(),
    life.StoreSilent(),
    life.WindowLapsed(),
    life.Overflowed("full"),
    life.Ended(),
    life.RoomNeeded(),
]
EVENTS: dict[type[Any], life.Event] = {type(event): event for event in _MADE}
WAYS: dict[S, list[type[life.Event]]] = {
    S.FOLLOWED: [],
    S.ALONE: [life.LastFollowerLeft],
    S.TOLD: [life.Ended],
    S.KEPT: [life.Ended, life.LastFollowerLeft],
    S.FORGOTTEN: [life.LastFollowerLeft, life.WindowLapsed],
}


def in_state(state: S) -> StreamLife:
    machine = StreamLife(WINDOW_S)
    for kind in WAYS[state]:
        machine.handle(EVENTS[kind], 0.0)
    assert machine.state is state
    return machine


def test_these_are_all_events() -> None:
    assert set(EVENTS) == set(ALL_EVENTS)


def test_every_state_can_be_reached() -> None:
    assert reach(EDGES, S.FOLLOWED) == set(S)


@pytest.mark.parametrize(("state", "kind"), list(itertools.product(S, ALL_EVENTS)))
def test_an_event_has_an_edge_or_changes_nothing(state: S, kind: type[life.Event]) -> None:
    machine = in_state(state)
    before = (machine.state, machine.next_deadline())
    if kind in EDGES[state]:
        machine.handle(EVENTS[kind], 1.0)
        assert machine.state is EDGES[state][kind]
    else:
        with pytest.raises(InvalidTransition):
            machine.handle(EVENTS[kind], 1.0)
        assert (machine.state, machine.next_deadline()) == before
    machine.check()


def test_the_window_runs_while_nobody_reads() -> None:
    machine = StreamLife(WINDOW_S)
    assert machine.next_deadline() is None
    machine.handle(life.LastFollowerLeft(), 1.0)
    assert machine.next_deadline() == 11.0
    machine.handle(life.FollowerCame(), 5.0)
    assert machine.next_deadline() is None
    machine.handle(life.LastFollowerLeft(), 6.0)
    machine.handle(life.ReadElsewhere(), 16.0)
    assert machine.next_deadline() == 26.0
    machine.handle(life.Overflowed("full"), 20.0)
    assert machine.next_deadline() == 26.0, "that is no reader"
    assert machine.handle(life.WindowLapsed(), 26.0) == [
        life.AbortUnread("nobody read it for 10 s"),
        life.Forget("lapsed"),
    ]


def test_what_is_over_is_kept_for_the_window_after_it_ended_or_was_read() -> None:
    machine = StreamLife(WINDOW_S)
    machine.handle(life.LastFollowerLeft(), 0.0)
    assert machine.handle(life.Ended(), 9.0) == []
    assert machine.next_deadline() == 19.0
    machine.handle(life.FollowerCame(), 18.0)
    machine.handle(life.LastFollowerLeft(), 18.5)
    assert machine.next_deadline() == 28.5
    assert machine.handle(life.WindowLapsed(), 28.5) == [life.Forget("lapsed")]


def test_a_store_that_is_away_gives_one_more_window() -> None:
    machine = in_state(S.ALONE)
    assert machine.handle(life.StoreSilent(), 10.0) == []
    assert machine.next_deadline() == 20.0
    machine.handle(life.ReadElsewhere(), 20.0)
    assert machine.handle(life.StoreSilent(), 30.0) == [], "it had come back"
    effects = machine.handle(life.StoreSilent(), 40.0)
    assert [type(effect) for effect in effects] == [life.AbortUnread, life.Forget]
    assert machine.state is S.FORGOTTEN
    machine.check()


def test_too_much_that_is_unread_ends_the_request_but_is_still_told() -> None:
    for state in (S.FOLLOWED, S.ALONE):
        machine = in_state(state)
        assert machine.handle(life.Overflowed("full"), 1.0) == [life.AbortOverflowed("full")]
        assert machine.state is state
        machine.handle(life.Ended(), 2.0)


def test_only_what_is_over_and_unread_makes_room() -> None:
    assert in_state(S.KEPT).handle(life.RoomNeeded(), 1.0) == [life.Forget("made room")]
    assert [state for state in S if life.RoomNeeded in EDGES[state]] == [S.KEPT]


@given(st.lists(st.sampled_from(ALL_EVENTS), max_size=30))
def test_any_walk_ends_a_running_request_exactly_when_it_is_forgotten(kinds: list[type[life.Event]]) -> None:
    machine, effects, is_over, now = StreamLife(WINDOW_S), [], False, 0.0
    for kind in kinds:
        if kind in EDGES[machine.state]:
            now += 1.0
            effects += machine.handle(EVENTS[kind], now)
            is_over = is_over or kind is life.Ended
        machine.check()
    forgotten = [effect for effect in effects if isinstance(effect, life.Forget)]
    unread = [effect for effect in effects if isinstance(effect, life.AbortUnread)]
    assert len(forgotten) == (machine.state is S.FORGOTTEN)
    assert len(unread) == (machine.state is S.FORGOTTEN and not is_over)
