"""Two session machines over a wire that drops, repeats, reorders and delays; hypothesis looks for a way to break them.

What must hold after every step: the sender is acknowledged only for a transfer that landed; each owner is told exactly
one outcome; nothing lands that was not written whole. And at the end, with silence and time: both sides have ended.
"""

from dataclasses import dataclass
from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.errors import InvalidTransition
from core.ids import RequestId, TransferId
from kv_transfer.receiver import events as receiving
from kv_transfer.receiver.session import ReceiverSession, ReceiveState
from kv_transfer.sender import events as sending
from kv_transfer.sender.session import SenderSession, SendState
from kv_transfer.session import NackReason

T, R = TransferId("t/0"), RequestId("t")
NUM_FRAMES = 3
FRAME_BYTES = 10
LEASE_S, OFFER_TIMEOUT_S = 30.0, 10.0


@dataclass(frozen=True)
class Frame:
    """A frame on the link; its index stands for its box."""

    index: int


class Wire(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.to_receiver: list[receiving.ReceiverEvent] = []
        self.to_sender: list[sending.SenderEvent] = []
        self.link: list[Frame] = []
        self.is_link_up = self.is_stream_up = True
        self.num_sent = 0
        self.written: set[int] = set()
        self.is_gate_open = False
        self.sender_told: list[str] = []
        self.receiver_told: list[str] = []
        self.sender: SenderSession
        self.receiver: ReceiverSession | None = None
        self.is_expected = False

    @initialize()
    def offer(self) -> None:
        self.sender = SenderSession(T, offer_timeout_s=OFFER_TIMEOUT_S, now=self.now)
        self.to_receiver.append(receiving.OfferReceived(R, 20, bytes_per_token=96))

    # --- owners ---

    @precondition(lambda self: not self.is_expected)
    @rule()
    def expect(self) -> None:
        self.is_expected = True
        expected = receiving.Expected(R, 4, 20, bytes_per_token=96, lease_s=LEASE_S)
        if self.receiver is None:
            self.receiver = ReceiverSession(T, expected, offer_timeout_s=OFFER_TIMEOUT_S, now=self.now)
        elif self.receiver.state is ReceiveState.OFFERED:
            self._feed_receiver(expected)
        else:
            self.is_expected = False  # the shell refuses: it has ended before

    @rule()
    def sender_owner_aborts(self) -> None:
        self._feed_sender(sending.Aborted(NackReason.CANCELLED, "owner"))

    @precondition(lambda self: self.receiver is not None)
    @rule()
    def receiver_owner_cancels(self) -> None:
        self._feed_receiver(receiving.Cancelled(NackReason.CANCELLED, "owner"))

    # --- the link: in order, loses everything when it breaks ---

    @precondition(lambda self: self._can_send() and self.num_sent < NUM_FRAMES)
    @rule()
    def send_frame(self) -> None:
        self.link.append(Frame(self.num_sent))
        self.num_sent += 1
        self._feed_sender(sending.FrameSent())

    @precondition(lambda self: self._can_send() and self.num_sent == NUM_FRAMES)
    @rule()
    def commit(self) -> None:
        self._feed_sender(sending.AllSent(NUM_FRAMES, NUM_FRAMES * FRAME_BYTES, 9))

    @precondition(lambda self: self.link)
    @rule(is_damaged=st.booleans())
    def frame_arrives(self, is_damaged: bool) -> None:
        frame = self.link.pop(0)
        if not self.is_gate_open:
            return  # late: drained and dropped
        if is_damaged:
            self.is_gate_open = False
            self._feed_receiver(receiving.FrameWasRefused(NackReason.CHECKSUM, "damaged"))
            return
        assert frame.index not in self.written
        self.written.add(frame.index)
        count = len(self.written)
        self._feed_receiver(receiving.FramesWritten(count, count * FRAME_BYTES, is_covered=count == NUM_FRAMES))

    @precondition(lambda self: self.is_link_up)
    @rule()
    def link_breaks(self) -> None:
        self.is_link_up = False
        self.link.clear()
        self._feed_sender(sending.LinkLost("broken"))
        if self.receiver is not None:
            self._feed_receiver(receiving.LinkLost("broken"))
        if self.num_sent:
            self._say_to_sender(sending.ReceiverLostLink("broken"))

    # --- the control stream: anything may happen to a message ---

    @precondition(lambda self: self.to_receiver)
    @rule(data=st.data(), keep=st.booleans())
    def message_to_receiver(self, data: st.DataObject, keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.to_receiver) - 1))
        event = self.to_receiver[index] if keep else self.to_receiver.pop(index)
        if self.receiver is None:
            if isinstance(event, receiving.OfferReceived):
                self.receiver = ReceiverSession(T, event, offer_timeout_s=OFFER_TIMEOUT_S, now=self.now)
            return
        self._feed_receiver(event)

    @precondition(lambda self: self.to_sender)
    @rule(data=st.data(), keep=st.booleans())
    def message_to_sender(self, data: st.DataObject, keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.to_sender) - 1))
        self._feed_sender(self.to_sender[index] if keep else self.to_sender.pop(index))

    @precondition(lambda self: self.to_receiver or self.to_sender)
    @rule(data=st.data())
    def message_is_dropped(self, data: st.DataObject) -> None:
        queue = cast(list[object], data.draw(st.sampled_from([q for q in (self.to_receiver, self.to_sender) if q])))
        queue.pop(data.draw(st.integers(0, len(queue) - 1)))

    @precondition(lambda self: self.is_stream_up)
    @rule()
    def stream_breaks(self) -> None:
        self.is_stream_up = False
        self.to_receiver.clear()
        self.to_sender.clear()
        self._feed_sender(sending.StreamLost("broken"))
        if self.receiver is not None:
            self._feed_receiver(receiving.StreamLost("broken"))

    @rule(seconds=st.floats(0.1, 12.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._tick()

    # --- properties ---

    @invariant()
    def ack_means_landed_and_landed_means_whole(self) -> None:
        if self.sender_told == ["acked"]:
            assert self.receiver_told == ["landed"]
        if self.receiver_told == ["landed"]:
            assert len(self.written) == NUM_FRAMES
        assert len(self.sender_told) <= 1
        assert len(self.receiver_told) <= 1

    @invariant()
    def machines_are_sound(self) -> None:
        if hasattr(self, "sender"):
            self.sender.check()
        if self.receiver is not None:
            self.receiver.check()

    def teardown(self) -> None:
        """Nobody says anything any more: leases alone must end both sides, unless the owner still computes."""
        if not hasattr(self, "sender"):
            return
        if self.sender.state in (SendState.RESERVED, SendState.SENDING):
            self._feed_sender(sending.Aborted(NackReason.CANCELLED, "the prefill ended"))
        for _ in range(20):
            self.now += LEASE_S
            self.to_receiver.clear()
            self.to_sender.clear()
            self._tick()
        assert self.sender.state.is_terminal
        assert len(self.sender_told) == 1
        if self.receiver is not None:
            assert self.receiver.state.is_terminal
            assert len(self.receiver_told) == int(self.is_expected)

    # --- the shells ---

    def _can_send(self) -> bool:
        return self.is_link_up and self.sender.state in (SendState.RESERVED, SendState.SENDING)

    def _tick(self) -> None:
        for _ in range(2):
            self._perform_sender(self.sender.tick(self.now))
        if self.receiver is not None:
            self._perform_receiver(self.receiver.tick(self.now))

    def _feed_sender(self, event: sending.SenderEvent) -> None:
        try:
            effects = self.sender.handle(event, self.now)
        except InvalidTransition:
            # As the shell does: the peer broke the protocol. Reordering can make an ACK overtake a reservation.
            assert isinstance(event, sending.AckReceived)
            effects = self.sender.handle(sending.Aborted(NackReason.PROTOCOL, "out of place"), self.now)
        self._perform_sender(effects)

    def _perform_sender(self, effects: list[sending.SenderEffect]) -> None:
        for effect in effects:
            match effect:
                case sending.SayCommit(num_frames, payload_bytes, token):
                    self._say_to_receiver(receiving.CommitReceived(num_frames, payload_bytes, token))
                case sending.SayAbort(reason):
                    self._say_to_receiver(receiving.AbortReceived(reason))
                case sending.SayRenewal():
                    self._say_to_receiver(receiving.LeaseRenewed())
                case sending.ReportAcked(_):
                    self.sender_told.append("acked")
                case sending.ReportFailed(reason, _):
                    self.sender_told.append(reason)
                case sending.StartSending():
                    pass

    def _feed_receiver(self, event: receiving.ReceiverEvent) -> None:
        assert self.receiver is not None
        self._perform_receiver(self.receiver.handle(event, self.now))

    def _perform_receiver(self, effects: list[receiving.ReceiverEffect]) -> None:
        assert self.receiver is not None
        for effect in effects:
            match effect:
                case receiving.SayReserved(held_tokens, lease_s):
                    self.is_gate_open = True
                    self._say_to_sender(sending.ReservationGranted(held_tokens, lease_s))
                case receiving.SayAck():
                    self._say_to_sender(sending.AckReceived(0.5))
                    self._perform_receiver(self.receiver.handle(receiving.AckSaid(), self.now))
                case receiving.SayNack(reason, detail):
                    self._say_to_sender(sending.NackReceived(reason, detail))
                case receiving.ReportLanded():
                    self.is_gate_open = False
                    self.receiver_told.append("landed")
                case receiving.ReportFailed(reason, _):
                    self.is_gate_open = False
                    self.receiver_told.append(reason)

    def _say_to_receiver(self, event: receiving.ReceiverEvent) -> None:
        if self.is_stream_up:
            self.to_receiver.append(event)

    def _say_to_sender(self, event: sending.SenderEvent) -> None:
        if self.is_stream_up:
            self.to_sender.append(event)


TestWire = Wire.TestCase
TestWire.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
