"""The table of the request machine: every state and event, reachability, ends, deadlines."""

import pytest

from core.errors import Aborted, DeadlineExceeded, InvalidTransition, ProtocolError, ServingError
from core.ids import WorkerId
from router import messages as m
from router.lifecycle import ALL_EVENTS, ASKING, EDGES, TERMINAL, RequestState
from tests.fakes.request_life import ALONE, D1, END, LANDED, P1, SAMPLES, TO, S, at, facts, freed, tokens, walk
from tests.state_tables import reach

OF_PREFILL = (m.PrefillAccepted, m.PrefillRejected, m.PrefillProduced, m.PrefillFinished, m.PrefillLost)


def sample(state: RequestState, kind: type[m.Event]) -> m.Event:
    """An event of `kind` that carries what comes next in `state`."""
    if kind is m.DecodeProduced and state is S.COMPUTING:
        return m.DecodeProduced(tokens(0))
    if kind is m.DecodeFinished and state is S.COMPUTING:
        return m.DecodeFinished(tokens(0), END)
    return SAMPLES[kind]


@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("kind", ALL_EVENTS, ids=lambda kind: kind.__name__)
def test_every_state_and_event_has_an_edge_or_is_refused(state: RequestState, kind: type[m.Event]) -> None:
    request = at(state)
    before = facts(request)
    expected = EDGES[state].get(kind)
    is_of_another = state in ALONE and kind in OF_PREFILL  # a decode worker has it there
    if expected is None or is_of_another:
        with pytest.raises(InvalidTransition if expected is None else ProtocolError):
            request.handle(sample(state, kind), 50.0)
        assert facts(request) == before
        return
    if state in (S.DISPATCHING, S.PREFILLING) and kind in (m.DecodeProduced, m.DecodeFinished):
        walk(LANDED, start=request)
    request.handle(sample(state, kind), 50.0)
    request.check()
    assert request.state is expected


def test_samples_and_table_are_complete() -> None:
    assert set(SAMPLES) == set(ALL_EVENTS)
    assert set(EDGES) == set(S)
    assert set(TO) == set(S)


def test_every_state_is_reachable_and_every_living_state_can_end() -> None:
    assert reach(EDGES, S.RECEIVED) == set(S)
    for state in set(S) - TERMINAL:
        assert {S.FAILED, S.ABORTED} <= set(EDGES[state].values())


@pytest.mark.parametrize("state", sorted(set(S) - TERMINAL))
@pytest.mark.parametrize("end", [m.RequestFailed(ServingError("no")), m.AbortRequested(Aborted("enough"))])
def test_an_early_end_frees_exactly_the_workers_that_were_asked(state: RequestState, end: m.Event) -> None:
    _, effects = walk(*TO[state], end)
    both, first, second = {P1, D1}, {P1}, {D1}
    assert set(freed(effects)) == {
        S.RESERVING: second,
        S.DISPATCHING: both,
        S.REROUTING: second,
        S.PREFILLING: both,
        S.HANDING_OVER: both,
        S.DECODING: second,
        S.STARTING: first,
        S.SEEKING: first,
        S.BINDING: both,
        S.HOLDING: first,
        S.PLACING: both,
        S.ENGAGING: second,
        S.COMPUTING: second,
        S.GENERATING: second,
    }.get(state, set())
    assert isinstance(effects[-1], m.Conclude)


def test_the_deadline_ends_it_from_anywhere() -> None:
    for state in set(S) - TERMINAL:
        request = at(state)
        assert request.poll(99.0) == [] or state in ASKING | {S.HOLDING}
        request = at(state)
        effects = request.poll(100.0)
        assert isinstance(effects[-1], m.Conclude)
        assert isinstance(effects[-1].error, DeadlineExceeded)
        assert request.next_deadline() is None
        assert request.poll(200.0) == []


@pytest.mark.parametrize(
    ("state", "silent"), [(S.RESERVING, D1), (S.DISPATCHING, P1), (S.STARTING, P1), (S.ENGAGING, D1)]
)
def test_a_worker_that_does_not_answer_in_time_is_lost(state: RequestState, silent: WorkerId) -> None:
    request = at(state)
    due = request.next_deadline()
    assert due is not None
    assert due == len(TO[state]) - 1 + 2.0
    assert request.poll(due - 0.01) == []
    effects = request.poll(due)
    assert effects[-1] == m.ChooseWorkers(frozenset({silent}))
    assert request.next_deadline() == 100.0
