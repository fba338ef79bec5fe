"""The request machine of the prefill worker: walks, the product of states and events, reachability, random events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidTransition, WorkerLost
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.request import Finish, FinishReason, GenerateRequest, RequestOutput, SamplingParams, TokenOutput
from prefill_workers.messages import (
    CommitTransfer,
    Event,
    FirstTokenComputed,
    HandOff,
    LastTokenComputed,
    ReleaseBlocks,
    Scheduled,
    SendComputed,
    SendHandedOver,
    TransferAcked,
)
from prefill_workers.state import EDGES, PrefillRequest, PrefillState
from workers.messages import (
    AbortInEngine,
    AbortRequested,
    BlocksFreed,
    DeadlinePassed,
    EngineFailed,
    GatewayLost,
    SendFailed,
    SendOutput,
    StopTransfer,
    TransferFailed,
    TransferStopped,
    WorkerClosed,
)

R = RequestId("r")
T = TransferId("r/0")
OUTPUT = RequestOutput(R, (TokenOutput(0, 42),))
ENDED = RequestOutput(R, (TokenOutput(0, 2),), Finish(FinishReason.STOP, 2))
FIRST = FirstTokenComputed(OUTPUT)
LAST = LastTokenComputed(ENDED)
LOST = WorkerLost("gone")
EVENTS: list[Event] = [
    Scheduled(0),
    FIRST,
    LAST,
    EngineFailed(LOST),
    TransferAcked(),
    TransferFailed("peer_lost", "d0"),
    TransferStopped(),
    BlocksFreed(),
    AbortRequested("client left"),
    GatewayLost(),
    DeadlinePassed(),
    WorkerClosed(LOST),
]
PATHS: dict[PrefillState, list[Event]] = {
    PrefillState.COMPUTING: [],
    PrefillState.SENDING: [FIRST],
    PrefillState.STOPPING: [AbortRequested("")],
    PrefillState.FREEING: [TransferFailed("peer_lost", "")],
    PrefillState.CLOSED: [TransferFailed("peer_lost", ""), BlocksFreed()],
}


def machine() -> PrefillRequest:
    hand_off = HandOff(T, WorkerId("d0"), Epoch(1), "host:1")
    request = GenerateRequest(R, (1, 2, 3), SamplingParams(max_tokens=8))
    return PrefillRequest(request, hand_off, now=10.0, compute_timeout_s=5.0, send_timeout_s=3.0)


def in_state(state: PrefillState) -> PrefillRequest:
    it = machine()
    for event in PATHS[state]:
        it.handle(event, 10.0)
    assert it.state is state
    return it


def test_the_good_way_hands_over_and_tells_so_last() -> None:
    it = machine()
    assert it.next_deadline() == 15.0
    assert it.handle(Scheduled(16), 10.25) == []
    assert it.handle(FIRST, 11.0) == [
        SendOutput(OUTPUT, "FirstTokenComputed"),
        SendComputed(R, 0.25, 0.75, 16, "FirstTokenComputed"),
        CommitTransfer(T, 42, "FirstTokenComputed"),
    ]
    assert it.next_deadline() == 14.0
    assert it.handle(TransferAcked(), 12.0) == [ReleaseBlocks(R, "TransferAcked")]
    assert it.handle(BlocksFreed(), 12.0) == [SendHandedOver(R, "TransferAcked")]
    assert it.state is PrefillState.CLOSED


def test_a_first_token_that_ends_the_stream_stops_the_transfer_and_keeps_the_prefix() -> None:
    it = machine()
    told = it.handle(LAST, 11.0)
    assert told[0] == SendOutput(ENDED, "LastTokenComputed")
    assert told[-1] == StopTransfer(R, T, "LastTokenComputed", "LastTokenComputed")
    assert it.handle(TransferStopped(), 11.0) == [ReleaseBlocks(R, "TransferStopped")]
    assert it.handle(BlocksFreed(), 11.0) == []


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
@pytest.mark.parametrize("state", [PrefillState.COMPUTING, PrefillState.SENDING])
def test_giving_up_stops_the_transfer_then_frees_then_tells(state: PrefillState, event: Event, is_told: bool) -> None:
    it = in_state(state)
    assert [type(effect) for effect in it.handle(event, 12.0)] == [StopTransfer]
    freeing = it.handle(TransferStopped(), 12.0)
    assert [type(e) for e in freeing] == [AbortInEngine if state is PrefillState.COMPUTING else ReleaseBlocks]
    assert [type(e) for e in it.handle(BlocksFreed(), 12.0)] == ([SendFailed] if is_told else [])


@pytest.mark.parametrize("state", [PrefillState.COMPUTING, PrefillState.SENDING])
def test_a_failed_transfer_needs_no_stopping(state: PrefillState) -> None:
    it = in_state(state)
    assert [type(e) for e in it.handle(TransferFailed("checksum", "frame 3"), 12.0)] == [
        AbortInEngine if state is PrefillState.COMPUTING else ReleaseBlocks
    ]
    (told,) = it.handle(BlocksFreed(), 12.0)
    assert isinstance(told, SendFailed)
    assert told.error.retryable
    assert "checksum" in str(told.error)


@pytest.mark.parametrize("state", list(PrefillState))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_in_every_state_has_an_edge_or_changes_nothing(state: PrefillState, event: Event) -> None:
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
        if after is state:
            assert effects == []
    it.check()


def test_every_state_leads_to_closed_and_is_reached() -> None:
    reached = {PrefillState.COMPUTING}
    while more := {after for state in reached for after in EDGES[state].values()} - reached:
        reached |= more
    assert reached == set(PrefillState)
    closing = {PrefillState.CLOSED}
    while more := {state for state in PrefillState if set(EDGES[state].values()) & closing} - closing:
        closing |= more
    assert closing == set(PrefillState)


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
def test_whatever_happens_blocks_are_freed_once_and_only_when_nothing_reads_them(events: list[Event]) -> None:
    it = machine()
    effects = []
    quiet = False  # the transfer has ended
    for event in [*events, GatewayLost(), TransferStopped(), BlocksFreed()]:
        try:
            new = it.handle(event, 11.0)
        except InvalidTransition:
            continue
        it.check()
        quiet = quiet or isinstance(event, TransferAcked | TransferFailed | TransferStopped)
        frees = [effect for effect in new if isinstance(effect, ReleaseBlocks | AbortInEngine)]
        assert quiet or not frees
        effects += new
    assert it.state is PrefillState.CLOSED
    assert sum(isinstance(effect, ReleaseBlocks | AbortInEngine) for effect in effects) == 1
    assert sum(isinstance(effect, SendFailed | SendHandedOver) for effect in effects) <= 1
