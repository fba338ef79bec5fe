"""The request machine of the prefill worker: walks, the product of states and events, reachability, random events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidTransition, WorkerLost
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.request import Finish, FinishReason, GenerateRequest, RequestOutput, SamplingParams, TokenOutput
from prefill_workers.messages import (
    Bound,
    CommitTransfer,
    Destination,
    Event,
    HandOff,
    KeepInEngine,
    KeptHere,
    LinkFacts,
    OfferTransfer,
    ReleaseBlocks,
    SendHandedOver,
    TransferAcked,
)
from prefill_workers.state import EDGES, PrefillRequest, PrefillState
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
    SendComputed,
    SendFailed,
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
OUTPUT = RequestOutput(R, (TokenOutput(0, 42),))
ENDED = RequestOutput(R, (TokenOutput(0, 2),), Finish(FinishReason.STOP, 2))
FIRST = FirstTokenComputed(OUTPUT)
LAST = LastTokenComputed(ENDED)
MORE = TokensProduced(RequestOutput(R, (TokenOutput(1, 43),)))
END = StreamFinished(RequestOutput(R, (TokenOutput(2, 44),), Finish(FinishReason.LENGTH)))
LOST = WorkerLost("gone")
TO = Destination(WorkerId("d0"), Epoch(1), "host:1")
LINK = LinkFacts(1e6, 0.001, 512)
EVENTS: list[Event] = [
    Scheduled(0),
    Bound(TO),
    KeptHere(),
    FIRST,
    LAST,
    MORE,
    END,
    EngineFailed(LOST),
    TransferAcked(LINK),
    TransferFailed("peer_lost", "d0"),
    TransferStopped(),
    BlocksFreed(),
    AbortRequested("client left"),
    GatewayLost(),
    DeadlinePassed(),
    WorkerClosed(LOST),
]
EARLY, LATE = HandOff(T, TO), HandOff(T, None)
STARTS: dict[str, HandOff | None] = {"early": EARLY, "late": LATE, "alone": None}
PATHS: dict[PrefillState, tuple[HandOff | None, list[Event]]] = {
    PrefillState.UNBOUND: (LATE, []),
    PrefillState.COMPUTING: (EARLY, []),
    PrefillState.LEASED: (LATE, [FIRST]),
    PrefillState.SENDING: (EARLY, [FIRST]),
    PrefillState.GENERATING: (None, [FIRST]),
    PrefillState.STOPPING: (EARLY, [AbortRequested("")]),
    PrefillState.FREEING: (EARLY, [TransferFailed("peer_lost", "")]),
    PrefillState.CLOSED: (EARLY, [TransferFailed("peer_lost", ""), BlocksFreed()]),
}


def machine(hand_off: HandOff | None = EARLY) -> PrefillRequest:
    request = GenerateRequest(R, (1, 2, 3), SamplingParams(max_tokens=8))
    return PrefillRequest(request, hand_off, now=10.0, compute_timeout_s=5.0, bind_timeout_s=2.0, send_timeout_s=3.0)


def in_state(state: PrefillState) -> PrefillRequest:
    hand_off, events = PATHS[state]
    it = machine(hand_off)
    for event in events:
        it.handle(event, 10.0)
    assert it.state is state
    return it


def test_the_good_way_hands_over_and_tells_so_last() -> None:
    it = machine()
    assert it.next_deadline() == 15.0
    assert it.handle(Scheduled(16), 10.25) == []
    assert it.handle(FIRST, 11.0) == [
        SendComputed(R, 0.25, 0.75, 16, "FirstTokenComputed"),
        SendOutput(OUTPUT, "FirstTokenComputed"),
        CommitTransfer(42, "FirstTokenComputed"),
    ]
    assert it.next_deadline() == 14.0
    assert it.handle(TransferAcked(LINK), 12.0) == [ReleaseBlocks(R, "TransferAcked")]
    assert it.handle(BlocksFreed(), 12.0) == [SendHandedOver(R, LINK, "TransferAcked")]
    assert it.state is PrefillState.CLOSED


def test_a_first_token_that_ends_the_stream_stops_the_transfer_and_keeps_the_prefix() -> None:
    it = machine()
    told = it.handle(LAST, 11.0)
    assert told[1] == SendOutput(ENDED, "LastTokenComputed")
    assert told[-1] == StopTransfer(R, T, "LastTokenComputed", "LastTokenComputed")
    assert it.handle(TransferStopped(), 11.0) == [ReleaseBlocks(R, "TransferStopped")]
    assert it.handle(BlocksFreed(), 11.0) == []


@pytest.mark.parametrize("words", [[Bound(TO), FIRST], [FIRST, Bound(TO)]], ids=["bound first", "computed first"])
def test_bound_late_it_is_offered_then_committed(words: list[Event]) -> None:
    it = machine(LATE)
    assert (it.state, it.transfer_id, it.next_deadline()) == (PrefillState.UNBOUND, T, 15.0)
    effects = [effect for at, event in enumerate(words) for effect in it.handle(event, 11.0 + at)]
    assert it.state is PrefillState.SENDING
    assert it.next_deadline() == 15.0  # three seconds for the transfer
    told = [SendComputed, SendOutput]
    offered = [OfferTransfer, *told] if words[1] is FIRST else [*told, OfferTransfer]
    assert [type(effect) for effect in effects] == [*offered, CommitTransfer]
    assert OfferTransfer(TO, "Bound") in effects
    assert it.handle(TransferAcked(), 13.0) == [ReleaseBlocks(R, "TransferAcked")]
    assert it.handle(BlocksFreed(), 13.0) == [SendHandedOver(R, None, "TransferAcked")]


def test_a_lease_waits_so_long_for_its_binding() -> None:
    it = machine(LATE)
    it.handle(FIRST, 11.0)
    assert (it.state, it.next_deadline()) == (PrefillState.LEASED, 13.0)
    assert it.handle(DeadlinePassed(), 13.0) == [ReleaseBlocks(R, "DeadlinePassed")]
    (told,) = it.handle(BlocksFreed(), 13.0)
    assert isinstance(told, SendFailed)
    assert "no decode worker" in str(told.error)
    assert told.error.retryable


@pytest.mark.parametrize("words", [[KeptHere(), FIRST], [FIRST, KeptHere()]], ids=["kept first", "computed first"])
def test_kept_here_it_generates_to_its_end(words: list[Event]) -> None:
    it = machine(LATE)
    effects = [effect for event in words for effect in it.handle(event, 11.0)]
    assert KeepInEngine(R, "KeptHere") in effects
    assert sum(isinstance(effect, SendOutput) for effect in effects) == 1
    assert (it.state, it.next_deadline()) == (PrefillState.GENERATING, None)
    assert it.handle(Scheduled(4), 11.0) == []  # it waited for its turn again
    assert it.handle(MORE, 12.0) == [SendOutput(MORE.output, "TokensProduced")]
    assert it.handle(END, 12.0) == [SendOutput(END.output, "StreamFinished")]
    assert it.state is PrefillState.CLOSED


def test_alone_it_generates_from_the_prompt_on() -> None:
    it = machine(None)
    assert (it.state, it.transfer_id, it.next_deadline()) == (PrefillState.GENERATING, None, 15.0)
    assert it.handle(Scheduled(2), 10.5) == []
    assert it.handle(FIRST, 11.0) == [
        SendComputed(R, 0.5, 0.5, 2, "FirstTokenComputed"),
        SendOutput(OUTPUT, "FirstTokenComputed"),
    ]
    assert it.next_deadline() is None
    assert it.handle(END, 12.0) == [SendOutput(END.output, "StreamFinished")]
    assert (it.state, it.ended_by) == (PrefillState.CLOSED, "StreamFinished")


def test_alone_one_token_is_all() -> None:
    it = machine(None)
    assert [type(effect) for effect in it.handle(LAST, 11.0)] == [SendComputed, SendOutput]
    assert it.state is PrefillState.CLOSED


@pytest.mark.parametrize("state", [PrefillState.COMPUTING, PrefillState.SENDING, PrefillState.GENERATING])
@pytest.mark.parametrize("word", [Bound(Destination(WorkerId("d1"), Epoch(1), "host:2")), KeptHere()])
def test_only_the_first_word_counts(state: PrefillState, word: Event) -> None:
    it = in_state(state)
    before = it.hand_off
    assert it.handle(word, 12.0) == []
    assert (it.state, it.hand_off) == (state, before)


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


@pytest.mark.parametrize("event", [EngineFailed(LOST), WorkerClosed(LOST), AbortRequested("x"), GatewayLost()])
@pytest.mark.parametrize("state", [PrefillState.UNBOUND, PrefillState.LEASED, PrefillState.GENERATING])
def test_giving_up_without_a_transfer_frees_at_once(state: PrefillState, event: Event) -> None:
    it = in_state(state)
    is_leased = state is PrefillState.LEASED
    assert [type(effect) for effect in it.handle(event, 12.0)] == [ReleaseBlocks if is_leased else AbortInEngine]
    is_told = isinstance(event, EngineFailed | WorkerClosed)
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
        if after is state and state is not PrefillState.GENERATING:
            assert effects == []
    it.check()


def test_every_state_leads_to_closed_and_is_reached() -> None:
    starts = {machine(hand_off).state for hand_off in STARTS.values()}
    assert starts == {PrefillState.COMPUTING, PrefillState.UNBOUND, PrefillState.GENERATING}
    assert reach(EDGES, *starts) == set(PrefillState)
    assert all(PrefillState.CLOSED in reach(EDGES, state) for state in PrefillState)


@given(st.sampled_from(list(STARTS)), st.lists(st.sampled_from(EVENTS), max_size=12))
def test_whatever_happens_blocks_are_freed_once_and_only_when_nothing_reads_them(
    start: str, events: list[Event]
) -> None:
    it = machine(STARTS[start])
    effects = []
    is_read = start == "early"  # a transfer was offered, and has not ended
    is_freed_by_engine = False
    for event in [*events, GatewayLost(), TransferStopped(), BlocksFreed()]:
        before = it.state
        try:
            new = it.handle(event, 11.0)
        except InvalidTransition:
            continue
        it.check()
        is_read = is_read or any(isinstance(effect, OfferTransfer) for effect in new)
        is_read = is_read and not isinstance(event, TransferAcked | TransferFailed | TransferStopped)
        frees = [effect for effect in new if isinstance(effect, ReleaseBlocks | AbortInEngine | KeepInEngine)]
        assert not (is_read and frees)
        is_freed_by_engine |= it.state is PrefillState.CLOSED and before is PrefillState.GENERATING
        effects += new
    assert it.state is PrefillState.CLOSED
    freed = sum(isinstance(effect, ReleaseBlocks | AbortInEngine) for effect in effects)
    assert freed == (0 if is_freed_by_engine else 1)
    assert sum(isinstance(effect, SendFailed | SendHandedOver) for effect in effects) <= 1
    assert sum(isinstance(effect, OfferTransfer | KeepInEngine) for effect in effects) <= 1
