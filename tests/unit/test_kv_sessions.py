"""Both session machines: walks, the product of all states and events, reachability, deadlines."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from core.errors import InvalidTransition
from core.ids import RequestId, TransferId
from kv_transfer.receiver import events as receiving
from kv_transfer.receiver.session import EDGES as RECEIVER_EDGES
from kv_transfer.receiver.session import ReceiverSession, ReceiveState
from kv_transfer.sender import events as sending
from kv_transfer.sender.session import EDGES as SENDER_EDGES
from kv_transfer.sender.session import SenderSession, SendState
from kv_transfer.session import NackReason
from tests.state_tables import reach

T, R = TransferId("t/0"), RequestId("t")
EXPECTED = receiving.Expected(R, 4, 20, bytes_per_token=96, lease_s=30.0)
OFFER = receiving.OfferReceived(R, 20, bytes_per_token=96)
COMMIT = receiving.CommitReceived(num_frames=2, payload_bytes=100, first_token_id=9)
COVERED = receiving.FramesWritten(num_frames=2, payload_bytes=100, is_covered=True)

SENDER_EVENTS: list[sending.SenderEvent] = [
    sending.ReservationGranted(4, 30.0),
    sending.FrameSent(),
    sending.AllSent(2, 100, 9),
    sending.AckReceived(0.5),
    sending.NackReceived(NackReason.CHECKSUM, "x"),
    sending.Aborted(NackReason.CANCELLED, "x"),
    sending.LinkLost("x"),
    sending.ReceiverLostLink("x"),
    sending.LinkMoved(),
    sending.StreamLost("x"),
    sending.RenewalDue(),
    sending.DeadlinePassed(),
]
RECEIVER_EVENTS: list[receiving.ReceiverEvent] = [
    EXPECTED,
    OFFER,
    receiving.FramesWritten(1, 50, is_covered=False),
    receiving.FrameWasRefused(NackReason.CHECKSUM, "x"),
    COMMIT,
    receiving.AllLanded(),
    receiving.CountsDiffered(NackReason.LENGTH, "x"),
    receiving.AckSaid(),
    receiving.AbortReceived(NackReason.CANCELLED),
    receiving.Cancelled(NackReason.CANCELLED, "x"),
    receiving.LeaseRenewed(),
    receiving.LinkLost("x"),
    receiving.StreamLost("x"),
    receiving.DeadlinePassed(),
]


def _sender(*events: sending.SenderEvent) -> SenderSession:
    machine = SenderSession(T, offer_timeout_s=10.0, now=0.0)
    for event in events:
        machine.handle(event, 0.0)
    return machine


def _receiver(first: receiving.Expected | receiving.OfferReceived, *events: receiving.ReceiverEvent) -> ReceiverSession:
    machine = ReceiverSession(T, first, offer_timeout_s=10.0, now=0.0)
    for event in events:
        machine.handle(event, 0.0)
    return machine


GRANTED, SENT, ALL_SENT = sending.ReservationGranted(4, 30.0), sending.FrameSent(), sending.AllSent(2, 100, 9)
SENDERS: Mapping[SendState, Callable[[], SenderSession]] = {
    SendState.OFFERED: _sender,
    SendState.RESERVED: lambda: _sender(GRANTED),
    SendState.SENDING: lambda: _sender(GRANTED, SENT),
    SendState.COMMITTED: lambda: _sender(GRANTED, SENT, ALL_SENT),
    SendState.ACKED: lambda: _sender(GRANTED, SENT, ALL_SENT, sending.AckReceived(0.5)),
    SendState.ABORTED: lambda: _sender(sending.Aborted(NackReason.CANCELLED, "x")),
    SendState.EXPIRED: lambda: _sender(sending.DeadlinePassed()),
}
ONE = receiving.FramesWritten(1, 50, is_covered=False)
RECEIVERS: Mapping[ReceiveState, Callable[[], ReceiverSession]] = {
    ReceiveState.EXPECTED: lambda: _receiver(EXPECTED),
    ReceiveState.OFFERED: lambda: _receiver(OFFER),
    ReceiveState.RESERVED: lambda: _receiver(EXPECTED, OFFER),
    ReceiveState.SENDING: lambda: _receiver(OFFER, EXPECTED, ONE),
    ReceiveState.LANDED: lambda: _receiver(EXPECTED, OFFER, ONE, COMMIT, COVERED),
    ReceiveState.ACKED: lambda: _receiver(EXPECTED, OFFER, ONE, COMMIT, COVERED, receiving.AckSaid()),
    ReceiveState.ABORTED: lambda: _receiver(EXPECTED, receiving.Cancelled(NackReason.CANCELLED, "x")),
    ReceiveState.EXPIRED: lambda: _receiver(EXPECTED, receiving.DeadlinePassed()),
}


def test_the_sender_walks_from_offer_to_ack() -> None:
    machine = SenderSession(T, offer_timeout_s=10.0, now=0.0)
    assert machine.handle(sending.ReservationGranted(4, 30.0), 1.0) == [sending.StartSending(4)]
    assert machine.handle(sending.FrameSent(), 2.0) == []
    assert machine.tick(11.0) == [sending.SayRenewal()]
    assert machine.handle(sending.AllSent(3, 99, 7), 12.0) == [sending.SayCommit(3, 99, 7)]
    assert machine.handle(sending.AckReceived(0.5), 13.0) == [sending.ReportAcked(0.5)]
    assert machine.next_deadline() is None


def test_the_receiver_walks_from_reservation_to_ack() -> None:
    machine = ReceiverSession(T, EXPECTED, offer_timeout_s=10.0, now=0.0)
    assert machine.handle(OFFER, 1.0) == [receiving.SayReserved(4, 30.0)]
    assert machine.handle(ONE, 2.0) == []
    assert machine.handle(COMMIT, 3.0) == []
    effects = machine.handle(COVERED, 5.0)
    assert effects == [receiving.SayAck(2.0), receiving.ReportLanded(9, COVERED, "none", 4.0, 2.0)]
    assert machine.handle(receiving.AckSaid(), 5.0) == []
    assert machine.next_deadline() is None


@pytest.mark.parametrize("state", SendState)
@pytest.mark.parametrize("event", SENDER_EVENTS, ids=lambda event: type(event).__name__)
def test_sender_product(state: SendState, event: sending.SenderEvent) -> None:
    _product(SENDERS[state](), state, event, SENDER_EDGES)


@pytest.mark.parametrize("state", ReceiveState)
@pytest.mark.parametrize("event", RECEIVER_EVENTS, ids=lambda event: type(event).__name__)
def test_receiver_product(state: ReceiveState, event: receiving.ReceiverEvent) -> None:
    _product(RECEIVERS[state](), state, event, RECEIVER_EDGES)


def _product(machine: Any, state: Any, event: Any, edges: Mapping[Any, Mapping[type, Any]]) -> None:
    assert machine.state is state
    machine.check()
    deadline = machine.next_deadline()
    after = edges[state].get(type(event))
    if after is None or isinstance(event, receiving.AllLanded | receiving.CountsDiffered):
        with pytest.raises(InvalidTransition):
            machine.handle(event, 1.0)
        assert (machine.state, machine.next_deadline()) == (state, deadline)
        return
    effects = machine.handle(event, 1.0)
    machine.check()
    assert machine.state is after
    if state.is_terminal:
        assert not any(type(effect).__name__.startswith("Report") for effect in effects)
    elif after.is_terminal and state is not ReceiveState.LANDED:
        assert machine.next_deadline() is None


@pytest.mark.parametrize("edges", [SENDER_EDGES, RECEIVER_EDGES], ids=["sender", "receiver"])
def test_every_state_is_reached_and_every_living_state_can_end(edges: Mapping[Any, Mapping[type, Any]]) -> None:
    first = next(iter(edges))
    starts = {first, ReceiveState.OFFERED} if isinstance(first, ReceiveState) else {first}
    assert reach(edges, *starts) == set(edges) == set(type(first).__members__.values())
    assert all(any(after.is_terminal for after in row.values()) for row in edges.values())


@pytest.mark.parametrize("state", [state for state in SendState if not state.is_terminal])
def test_the_sender_can_be_aborted_and_loses_its_stream_anywhere(state: SendState) -> None:
    aborted = SENDERS[state]().handle(sending.Aborted(NackReason.CANCELLED, "x"), 1.0)
    assert aborted == [sending.SayAbort(NackReason.CANCELLED), sending.ReportFailed(NackReason.CANCELLED, "x")]
    assert SENDERS[state]().handle(sending.StreamLost("x"), 1.0) == [sending.ReportFailed(NackReason.PEER_LOST, "x")]


@pytest.mark.parametrize("state", [ReceiveState.EXPECTED, ReceiveState.RESERVED, ReceiveState.SENDING])
def test_the_receiver_can_be_cancelled_anywhere_before_landing(state: ReceiveState) -> None:
    effects = RECEIVERS[state]().handle(receiving.Cancelled(NackReason.CANCELLED, "x"), 1.0)
    assert effects[-1] == receiving.ReportFailed(NackReason.CANCELLED, "x")
    assert effects[0] == receiving.SayNack(NackReason.CANCELLED, "x")


def test_after_landing_nothing_takes_the_kv_back() -> None:
    machine = RECEIVERS[ReceiveState.LANDED]()
    for event in (receiving.Cancelled(NackReason.CANCELLED, "x"), receiving.AbortReceived(NackReason.CANCELLED)):
        assert machine.handle(event, 1.0) == []
    assert machine.state is ReceiveState.LANDED


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([OFFER, COMMIT, receiving.FramesWritten(2, 100, is_covered=False)], "not all"),
        ([OFFER, COMMIT, receiving.FramesWritten(2, 99, is_covered=True)], "99"),
        ([OFFER, COMMIT, receiving.FramesWritten(3, 100, is_covered=True)], "wrote 3"),
        ([receiving.OfferReceived(R, 21, bytes_per_token=96)], "offered 21"),
    ],
    ids=["hole", "bytes", "too many", "other prompt"],
)
def test_what_does_not_add_up_is_refused(events: list[receiving.ReceiverEvent], says: str) -> None:
    machine = ReceiverSession(T, EXPECTED, offer_timeout_s=10.0, now=0.0)
    effects: list[receiving.ReceiverEffect] = []
    for event in events:
        effects = machine.handle(event, 1.0)
    assert machine.state is ReceiveState.ABORTED
    assert isinstance(effects[0], receiving.SayNack)
    assert effects[0].reason == NackReason.LENGTH
    assert says in effects[0].detail


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (receiving.OfferReceived(RequestId("other"), 20, bytes_per_token=96), NackReason.PROTOCOL),
        (receiving.OfferReceived(R, 20, bytes_per_token=48), NackReason.LAYOUT),
        (receiving.OfferReceived(R, 21, bytes_per_token=96), NackReason.LENGTH),
    ],
)
@pytest.mark.parametrize("is_offer_first", [True, False])
def test_an_offer_must_be_of_what_was_reserved(
    offer: receiving.OfferReceived, reason: NackReason, is_offer_first: bool
) -> None:
    first, second = (offer, EXPECTED) if is_offer_first else (EXPECTED, offer)
    machine = ReceiverSession(T, first, offer_timeout_s=10.0, now=0.0)
    effects = machine.handle(second, 1.0)
    assert machine.state is ReceiveState.ABORTED
    assert [(type(effect), effect.reason) for effect in effects] == [  # type: ignore[union-attr]
        (receiving.SayNack, reason),
        (receiving.ReportFailed, reason),
    ]


def test_a_prompt_that_is_held_whole_lands_without_frames() -> None:
    machine = _receiver(receiving.Expected(R, 20, 20, bytes_per_token=96, lease_s=30.0), OFFER)
    effects = machine.handle(receiving.CommitReceived(0, 0, 9), 1.0)
    assert [type(effect) for effect in effects] == [receiving.SayAck, receiving.ReportLanded]


def test_late_questions_get_the_same_answer_again() -> None:
    refused = RECEIVERS[ReceiveState.ABORTED]()
    assert refused.handle(COMMIT, 1.0) == [receiving.SayNack(NackReason.CANCELLED, "x")]
    assert refused.handle(OFFER, 1.0) == [receiving.SayNack(NackReason.CANCELLED, "x")]
    assert RECEIVERS[ReceiveState.ACKED]().handle(COMMIT, 1.0) == [receiving.SayAck(0.0)]
    assert RECEIVERS[ReceiveState.RESERVED]().handle(OFFER, 1.0) == [receiving.SayReserved(4, 30.0)]


@pytest.mark.parametrize(
    ("state", "at"), [(SendState.OFFERED, 10.0), (SendState.COMMITTED, 30.0)], ids=["no answer", "no verdict"]
)
def test_the_sender_expires_in_silence(state: SendState, at: float) -> None:
    machine = SENDERS[state]()
    assert not any(isinstance(effect, sending.ReportFailed) for effect in machine.tick(at - 0.1))
    machine.tick(at)  # a renewal may be due first
    machine.tick(at)
    assert machine.state is SendState.EXPIRED


def test_heartbeats_keep_a_reservation_and_silence_ends_it() -> None:
    machine = _receiver(EXPECTED, OFFER)
    for now in range(10, 200, 10):
        assert machine.tick(now) == []
        machine.handle(receiving.LeaseRenewed(), now)
    assert machine.tick(219.9) == []
    effects = machine.tick(220.0)
    assert machine.state is ReceiveState.EXPIRED
    assert effects[-1] == receiving.ReportFailed(NackReason.LEASE_EXPIRED, "nothing was heard while reserved")


def test_a_stray_offer_is_answered_after_a_while() -> None:
    machine = _receiver(OFFER)
    effects = machine.tick(10.0)
    assert effects == [receiving.SayNack(NackReason.UNKNOWN_TRANSFER, "nobody here expects it")]


def test_a_committed_transfer_whose_frames_still_move_on_a_slow_wire_does_not_expire() -> None:
    machine = SenderSession(T, offer_timeout_s=5.0, now=0.0)
    machine.handle(sending.ReservationGranted(0, 30.0), 0.0)
    machine.handle(sending.FrameSent(), 1.0)
    machine.handle(sending.AllSent(1, 100, 9), 2.0)
    for at in (20.0, 45.0, 70.0):
        assert machine.handle(sending.LinkMoved(), at) == []
    machine.tick(99.0)
    assert machine.state is SendState.COMMITTED
    machine.tick(100.0)
    assert str(machine.state) == SendState.EXPIRED
