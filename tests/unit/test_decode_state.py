"""The request machine of the decode worker: walks, the product of states and events, reachability, random events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest, InvalidTransition, RejectedError, RejectReason, WorkerLost
from core.ids import RequestId, TransferId
from core.request import Finish, FinishReason, GenerateRequest, RequestOutput, SamplingParams, TokenOutput
from decode_workers.messages import (
    ActivateInEngine,
    BlocksReserved,
    EngineRefused,
    Event,
    Expected,
    ExpectTransfer,
    KvLanded,
    PromptQueued,
    SendLanded,
    TransferCancelled,
)
from decode_workers.state import EDGES, LIVING, DecodeRequest, DecodeState
from tests.state_tables import reach
from workers.messages import (
    AbortInEngine,
    AbortRequested,
    BlocksFreed,
    DeadlinePassed,
    EngineFailed,
    FirstTokenComputed,
    GatewayLost,
    LastTokenComputed,
    Scheduled,
    SendAccepted,
    SendComputed,
    SendFailed,
    SendOutput,
    SendRejected,
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
LANDED = KvLanded(42, 0.25, 4096, 512, "x8", is_lossless=False)
LOST = WorkerLost("gone")
RESERVED = BlocksReserved(16)
QUEUED = PromptQueued(8)
FIRST = FirstTokenComputed(RequestOutput(R, (TokenOutput(0, 42),)))
LAST = LastTokenComputed(RequestOutput(R, (TokenOutput(0, 2),), Finish(FinishReason.STOP, 2)))
FULL = EngineRefused(RejectedError(RejectReason.NO_BLOCKS))
EVENTS: list[Event] = [
    RESERVED,
    QUEUED,
    FULL,
    LANDED,
    Scheduled(0),
    FIRST,
    LAST,
    TransferFailed("peer_lost", "p0"),
    TransferCancelled("cancelled", "aborted by the sender"),
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
EXPECTED = Expected(T, 2.0)
PATHS: dict[DecodeState, tuple[Expected | None, list[Event]]] = {
    DecodeState.QUEUEING: (None, []),
    DecodeState.GENERATING: (None, [QUEUED]),
    DecodeState.RESERVING: (EXPECTED, []),
    DecodeState.RESERVED: (EXPECTED, [RESERVED]),
    DecodeState.RUNNING: (EXPECTED, [RESERVED, LANDED]),
    DecodeState.STOPPING: (EXPECTED, [RESERVED, AbortRequested("")]),
    DecodeState.FREEING: (EXPECTED, [RESERVED, LANDED, GatewayLost()]),
    DecodeState.CLOSED: (EXPECTED, [FULL]),
}


def machine(expected: Expected | None = EXPECTED) -> DecodeRequest:
    request = GenerateRequest(R, tuple(range(20)), SamplingParams(max_tokens=8))
    return DecodeRequest(request, expected, now=10.0, compute_timeout_s=4.0, landing_timeout_s=5.0)


def in_state(state: DecodeState) -> DecodeRequest:
    expected, events = PATHS[state]
    it = machine(expected)
    for event in events:
        it.handle(event, 10.0)
    assert it.state is state
    return it


def test_the_good_way_lands_runs_and_finishes() -> None:
    it = machine()
    assert it.handle(RESERVED, 10.0) == [
        ExpectTransfer(R, T, 16, 20, 2.0, "BlocksReserved"),
        SendAccepted(R, 16, "BlocksReserved"),
    ]
    assert it.next_deadline() == 15.0
    assert it.handle(LANDED, 11.0) == [ActivateInEngine(R, 42, False, 0, "KvLanded")]
    assert it.next_deadline() is None
    assert it.handle(MORE, 11.5) == [
        SendLanded(R, 0.25, 0.5, 16, 4, 4096, 512, "x8", False, "TokensProduced"),
        SendOutput(MORE.output, "TokensProduced"),
    ]
    assert it.handle(MORE, 12.0) == [SendOutput(MORE.output, "TokensProduced")]
    assert it.handle(END, 12.5) == [SendOutput(END.output, "StreamFinished")]
    assert it.state is DecodeState.CLOSED


def test_a_prompt_of_its_own_is_accepted_computed_and_generated() -> None:
    it = machine(None)
    assert (it.state, it.transfer_id, it.next_deadline()) == (DecodeState.QUEUEING, None, None)
    assert it.handle(QUEUED, 10.5) == [SendAccepted(R, 8, "PromptQueued")]
    assert it.next_deadline() == 14.5
    assert it.handle(Scheduled(8), 11.0) == []
    assert it.handle(FIRST, 11.5) == [
        SendComputed(R, 1.0, 0.5, 8, "FirstTokenComputed"),
        SendOutput(FIRST.output, "FirstTokenComputed"),
    ]
    assert it.next_deadline() is None
    assert it.handle(MORE, 12.0) == [SendOutput(MORE.output, "TokensProduced")]
    assert it.handle(END, 12.5) == [SendOutput(END.output, "StreamFinished")]
    assert (it.state, it.ended_by) == (DecodeState.CLOSED, "StreamFinished")


def test_a_prompt_of_its_own_may_end_with_its_first_token_or_too_late() -> None:
    it = in_state(DecodeState.GENERATING)
    assert [type(effect) for effect in it.handle(LAST, 11.0)] == [SendComputed, SendOutput]
    assert it.state is DecodeState.CLOSED
    it = in_state(DecodeState.GENERATING)
    assert [type(effect) for effect in it.handle(DeadlinePassed(), 14.0)] == [AbortInEngine]
    (told,) = it.handle(BlocksFreed(), 14.0)
    assert isinstance(told, SendFailed)
    assert told.error.retryable


@pytest.mark.parametrize(
    ("error", "told"),
    [(RejectedError(RejectReason.NO_BLOCKS), SendRejected), (InvalidRequest("sampling.stop", "no"), SendFailed)],
    ids=["another may take it", "nobody can"],
)
@pytest.mark.parametrize("state", [DecodeState.QUEUEING, DecodeState.RESERVING])
def test_a_refusal_of_the_engine_is_one_answer(
    error: RejectedError | InvalidRequest, told: type, state: DecodeState
) -> None:
    it = in_state(state)
    assert [type(effect) for effect in it.handle(EngineRefused(error), 10.0)] == [told]
    assert it.state is DecodeState.CLOSED


@pytest.mark.parametrize(("state", "answer"), [(DecodeState.QUEUEING, QUEUED), (DecodeState.RESERVING, RESERVED)])
def test_giving_up_while_the_engine_is_asked_frees_what_it_takes(state: DecodeState, answer: Event) -> None:
    it = in_state(state)
    assert [type(effect) for effect in it.handle(GatewayLost(), 10.0)] == [AbortInEngine]
    assert it.handle(answer, 10.0) == []
    assert it.handle(BlocksFreed(), 10.0) == []


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
    it = in_state(DecodeState.RESERVED)
    assert [type(effect) for effect in it.handle(event, 12.0)] == [StopTransfer]
    assert [type(effect) for effect in it.handle(LANDED, 12.0)] == []
    assert [type(effect) for effect in it.handle(TransferStopped(), 12.0)] == [AbortInEngine]
    assert [type(effect) for effect in it.handle(BlocksFreed(), 12.0)] == ([SendFailed] if is_told else [])


@pytest.mark.parametrize(
    ("event", "is_told"),
    [(EngineFailed(LOST), True), (WorkerClosed(LOST), True), (AbortRequested("x"), False), (GatewayLost(), False)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("state", [DecodeState.RUNNING, DecodeState.GENERATING])
def test_giving_up_in_the_batch_frees_at_once(event: Event, is_told: bool, state: DecodeState) -> None:
    it = in_state(state)
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
    assert reach(EDGES, DecodeState.RESERVING, DecodeState.QUEUEING) == set(DecodeState)
    assert all(DecodeState.CLOSED in reach(EDGES, state) for state in DecodeState)


@given(st.sampled_from([EXPECTED, None]), st.lists(st.sampled_from(EVENTS), max_size=12))
def test_whatever_happens_blocks_are_freed_once_and_only_when_nothing_writes_them(
    expected: Expected | None, events: list[Event]
) -> None:
    it = machine(expected)
    effects = []
    is_written = False  # a transfer is expected and has not ended
    is_freed_by_engine = False
    for event in [*events, GatewayLost(), TransferStopped(), BlocksFreed()]:
        before = it.state
        try:
            new = it.handle(event, 11.0)
        except InvalidTransition:
            continue
        it.check()
        if isinstance(event, TransferFailed | TransferCancelled | TransferStopped | KvLanded):
            is_written = False
        assert not is_written or not any(isinstance(effect, AbortInEngine | ActivateInEngine) for effect in new)
        is_written = is_written or any(isinstance(effect, ExpectTransfer) for effect in new)
        if it.state is DecodeState.CLOSED and before in LIVING:
            is_freed_by_engine = True
        effects += new
    assert it.state is DecodeState.CLOSED
    assert sum(isinstance(effect, AbortInEngine) for effect in effects) == (0 if is_freed_by_engine else 1)
    assert sum(isinstance(effect, SendAccepted | SendRejected) for effect in effects) <= 1
    assert sum(isinstance(effect, SendRejected | SendFailed) for effect in effects) <= 1
