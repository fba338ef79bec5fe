"""The request machine of the decode worker: walks, the product of states and events, reachability, random events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidTransition, WorkerLost
from core.ids import RequestId, TransferId
from core.request import Finish, FinishReason, GenerateRequest, RequestOutput, SamplingParams, TokenOutput
from decode_workers.state import (
    EDGES,
    AbortInEngine,
    AbortRequested,
    ActivateInEngine,
    BlocksFreed,
    DeadlinePassed,
    DecodeRequest,
    DecodeState,
    EngineFailed,
    Event,
    GatewayLost,
    KvLanded,
    SendFailed,
    SendLanded,
    SendOutput,
    StopTransfer,
    StreamFinished,
    TokensProduced,
    TransferFailed,
    TransferStopped,
    WorkerClosed,
)

R = RequestId("r")
T = TransferId("r/0")
MORE = TokensProduced(RequestOutput(R, (TokenOutput(1, 43),)))
END = StreamFinished(RequestOutput(R, (TokenOutput(2, 44),), Finish(FinishReason.LENGTH)))
LANDED = KvLanded(42, 0.25, 4096)
LOST = WorkerLost("gone")
EVENTS: list[Event] = [
    LANDED,
    TransferFailed("peer_lost", "p0"),
    TransferStopped(),
    MORE,
    END,
    EngineFailed(LOST),
    BlocksFreed(),
    AbortRequested("client left"),
    GatewayLost(),
    DeadlinePassed(),
    WorkerClosed(LOST),
]
PATHS: dict[DecodeState, list[Event]] = {
    DecodeState.RESERVED: [],
    DecodeState.RUNNING: [LANDED],
    DecodeState.STOPPING: [AbortRequested("")],
    DecodeState.FREEING: [LANDED, GatewayLost()],
    DecodeState.CLOSED: [LANDED, END],
}


def machine() -> DecodeRequest:
    request = GenerateRequest(R, tuple(range(20)), SamplingParams(max_tokens=8))
    return DecodeRequest(request, T, 16, now=10.0, landing_timeout_s=5.0)


def in_state(state: DecodeState) -> DecodeRequest:
    it = machine()
    for event in PATHS[state]:
        it.handle(event, 10.0)
    assert it.state is state
    return it


def test_the_good_way_lands_runs_and_finishes() -> None:
    it = machine()
    assert it.next_deadline() == 15.0
    assert it.handle(LANDED, 11.0) == [ActivateInEngine(R, 42, "KvLanded")]
    assert it.next_deadline() is None
    assert it.handle(MORE, 11.5) == [
        SendLanded(R, 0.25, 0.5, 16, 4, 4096, "TokensProduced"),
        SendOutput(MORE.output, "TokensProduced"),
    ]
    assert it.handle(MORE, 12.0) == [SendOutput(MORE.output, "TokensProduced")]
    assert it.handle(END, 12.5) == [SendOutput(END.output, "StreamFinished")]
    assert it.state is DecodeState.CLOSED


def test_a_stream_of_two_tokens_tells_of_the_landing_too() -> None:
    it = in_state(DecodeState.RUNNING)
    assert [type(effect) for effect in it.handle(END, 12.0)] == [SendLanded, SendOutput]


@pytest.mark.parametrize(
    ("event", "is_told"),
    [
        (EngineFailed(LOST), True),
        (WorkerClosed(LOST), True),
        (DeadlinePassed(), True),
        (AbortRequested("x"), False),
        (GatewayLost(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_giving_up_before_the_landing_stops_the_transfer_first(event: Event, is_told: bool) -> None:
    it = machine()
    assert [type(effect) for effect in it.handle(event, 12.0)] == [StopTransfer]
    assert [type(effect) for effect in it.handle(LANDED, 12.0)] == []
    assert [type(effect) for effect in it.handle(TransferStopped(), 12.0)] == [AbortInEngine]
    assert [type(effect) for effect in it.handle(BlocksFreed(), 12.0)] == ([SendFailed] if is_told else [])


@pytest.mark.parametrize(
    ("event", "is_told"),
    [(EngineFailed(LOST), True), (WorkerClosed(LOST), True), (AbortRequested("x"), False), (GatewayLost(), False)],
    ids=lambda value: type(value).__name__,
)
def test_giving_up_after_the_landing_frees_at_once(event: Event, is_told: bool) -> None:
    it = in_state(DecodeState.RUNNING)
    assert [type(effect) for effect in it.handle(event, 12.0)] == [AbortInEngine]
    assert it.handle(MORE, 12.0) == []  # the step that was running
    assert [type(effect) for effect in it.handle(BlocksFreed(), 12.0)] == ([SendFailed] if is_told else [])


@pytest.mark.parametrize("state", list(DecodeState))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_in_every_state_has_an_edge_or_changes_nothing(state: DecodeState, event: Event) -> None:
    it = in_state(state)
    after = EDGES[state].get(type(event))
    deadline = it.next_deadline()
    if after is None:
        with pytest.raises(InvalidTransition):
            it.handle(event, 12.0)
        assert (it.state, it.next_deadline()) == (state, deadline)
    else:
        effects = it.handle(event, 12.0)
        assert it.state is after
        assert all(effect.cause for effect in effects)
    it.check()


def test_every_state_leads_to_closed_and_is_reached() -> None:
    reached = {DecodeState.RESERVED}
    while more := {after for state in reached for after in EDGES[state].values()} - reached:
        reached |= more
    assert reached == set(DecodeState)
    closing = {DecodeState.CLOSED}
    while more := {state for state in DecodeState if set(EDGES[state].values()) & closing} - closing:
        closing |= more
    assert closing == set(DecodeState)


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
def test_whatever_happens_blocks_are_freed_once_and_only_when_nothing_writes_them(events: list[Event]) -> None:
    it = machine()
    effects = []
    quiet = False  # the transfer has ended
    finished = False
    for event in [*events, GatewayLost(), TransferStopped(), BlocksFreed()]:
        try:
            before = it.state
            new = it.handle(event, 11.0)
        except InvalidTransition:
            continue
        it.check()
        quiet = quiet or isinstance(event, TransferFailed | TransferStopped | KvLanded)
        finished = finished or (before is DecodeState.RUNNING and isinstance(event, StreamFinished))
        assert quiet or not any(isinstance(effect, AbortInEngine | ActivateInEngine) for effect in new)
        effects += new
    assert it.state is DecodeState.CLOSED
    assert sum(isinstance(effect, AbortInEngine) for effect in effects) == (0 if finished else 1)
    assert sum(isinstance(effect, SendFailed) for effect in effects) <= 1
