"""The receiver's half of one transfer, as a machine: events in, effects out, no I/O, no clock of its own.

Life cycle::

    EXPECTED --OfferReceived--+
                              +--> RESERVED --FramesWritten--> SENDING --AllLanded--> LANDED --AckSaid--> ACKED
    OFFERED  --Expected-------+
       any before LANDED may end in ABORTED (either owner, a refused frame, link, stream) or in EXPIRED (silence)

The owner's reservation and the sender's offer come over different roads, in either order. Landed means: the commit was
received, exactly its number of frames was written, and they cover exactly what was reserved. The shell (`receiver`)
feeds events on its event loop, performs the effects in order, and calls `tick` at `next_deadline`.
"""

from collections.abc import Mapping
from enum import StrEnum

from core.errors import InvalidTransition
from core.ids import TransferId
from kv_transfer.receiver.events import (
    AbortReceived,
    AckSaid,
    AllLanded,
    Cancelled,
    CommitReceived,
    CountsDiffered,
    DeadlinePassed,
    Expected,
    FramesWritten,
    FrameWasRefused,
    LeaseRenewed,
    LinkLost,
    NeedOnly,
    OfferReceived,
    ReceiverEffect,
    ReceiverEvent,
    ReportFailed,
    ReportLanded,
    SayAck,
    SayNack,
    SayReserved,
    StreamLost,
)
from kv_transfer.session import NackReason


class ReceiveState(StrEnum):
    EXPECTED = "expected"
    OFFERED = "offered"
    RESERVED = "reserved"
    SENDING = "sending"
    LANDED = "landed"
    ACKED = "acked"
    ABORTED = "aborted"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self in (ReceiveState.ACKED, ReceiveState.ABORTED, ReceiveState.EXPIRED)


_S = ReceiveState

EDGES: Mapping[ReceiveState, Mapping[type, ReceiveState]] = {
    _S.EXPECTED: {
        OfferReceived: _S.RESERVED,  # the prefill worker took the request
        CountsDiffered: _S.ABORTED,  # the offer is not of the prompt that was reserved for
        AbortReceived: _S.ABORTED,  # it overtook its own offer
        Cancelled: _S.ABORTED,
        LeaseRenewed: _S.EXPECTED,  # a stray
        CommitReceived: _S.EXPECTED,  # it overtook its own offer; the sender will expire
        LinkLost: _S.EXPECTED,  # not bound to a pair yet
        StreamLost: _S.EXPECTED,
        DeadlinePassed: _S.EXPIRED,  # no prefill worker ever came
    },
    _S.OFFERED: {
        OfferReceived: _S.OFFERED,  # duplicate
        Expected: _S.RESERVED,  # the reservation is here too
        CountsDiffered: _S.ABORTED,
        AbortReceived: _S.ABORTED,
        Cancelled: _S.ABORTED,  # this side is closing
        LeaseRenewed: _S.OFFERED,  # a stray
        CommitReceived: _S.OFFERED,  # a stray; the sender will expire
        LinkLost: _S.OFFERED,  # nothing of it was on the link
        StreamLost: _S.ABORTED,
        DeadlinePassed: _S.EXPIRED,  # nobody here knows the transfer
    },
    _S.RESERVED: {
        OfferReceived: _S.RESERVED,  # duplicate: say it again
        FramesWritten: _S.SENDING,  # the first frames are in the pool
        FrameWasRefused: _S.ABORTED,
        CommitReceived: _S.RESERVED,  # the control stream is faster than the link
        AllLanded: _S.LANDED,  # zero frames: everything was held
        CountsDiffered: _S.ABORTED,
        AbortReceived: _S.ABORTED,
        Cancelled: _S.ABORTED,
        LeaseRenewed: _S.RESERVED,  # the prefill is computing
        LinkLost: _S.RESERVED,  # no frame of it came; the sender knows whether one was on it, and is told
        StreamLost: _S.ABORTED,
        DeadlinePassed: _S.EXPIRED,  # heartbeats stopped
    },
    _S.SENDING: {
        OfferReceived: _S.SENDING,  # duplicate
        FramesWritten: _S.SENDING,  # more frames
        FrameWasRefused: _S.ABORTED,
        CommitReceived: _S.SENDING,  # the last frames are on the wire
        AllLanded: _S.LANDED,  # complete and verified
        CountsDiffered: _S.ABORTED,
        AbortReceived: _S.ABORTED,
        Cancelled: _S.ABORTED,
        LeaseRenewed: _S.SENDING,
        LinkLost: _S.ABORTED,  # frames never continue on another link
        StreamLost: _S.ABORTED,
        DeadlinePassed: _S.EXPIRED,
    },
    _S.LANDED: {
        AckSaid: _S.ACKED,  # handed to the control stream
        StreamLost: _S.ACKED,  # nobody is left to tell; the KV is good
        # from here on the owner has the KV, and nothing can take it back
        OfferReceived: _S.LANDED,
        FramesWritten: _S.LANDED,  # told late by the receiver thread
        FrameWasRefused: _S.LANDED,  # a duplicate
        CommitReceived: _S.LANDED,
        AbortReceived: _S.LANDED,
        Cancelled: _S.LANDED,
        LeaseRenewed: _S.LANDED,
        LinkLost: _S.LANDED,
    },
    # After the end: what was on its way may still arrive; some of it is answered, none changes anything.
    **{
        state: {
            OfferReceived: state,
            FramesWritten: state,
            FrameWasRefused: state,
            CommitReceived: state,  # said again: ACK or the reason of the NACK
            AbortReceived: state,
            Cancelled: state,
            LeaseRenewed: state,
            LinkLost: state,
            StreamLost: state,
        }
        for state in (_S.ACKED, _S.ABORTED, _S.EXPIRED)
    },
}


class ReceiverSession:
    """One transfer as the decode worker sees it. Not thread-safe: one event loop feeds it."""

    def __init__(self, transfer_id: TransferId, first: Expected | OfferReceived, *, offer_timeout_s: float, now: float):
        """Begin with whichever side spoke first."""
        self.transfer_id = transfer_id
        self._expected: Expected | None = None
        self._offer: OfferReceived | None = None
        self._commit: CommitReceived | None = None
        self._written = FramesWritten(0, 0, is_covered=False)
        self._verdict: tuple[NackReason, str] | None = None
        self._offered_at = self._committed_at = now
        if isinstance(first, Expected):
            self.state = ReceiveState.EXPECTED
            self._expected = first
        else:
            self.state = ReceiveState.OFFERED
            self._offer = first
        lease_s = first.lease_s if isinstance(first, Expected) else offer_timeout_s
        self._expires_at: float | None = now + lease_s

    def next_deadline(self) -> float | None:
        """Return when `tick` has something to do, None when never. Pure."""
        return self._expires_at

    def tick(self, now: float) -> list[ReceiverEffect]:
        """Let pass what is due."""
        if self._expires_at is not None and now >= self._expires_at:
            return self.handle(DeadlinePassed(), now)
        return []

    def handle(self, event: ReceiverEvent, now: float) -> list[ReceiverEffect]:
        """Take one event; return what the shell must do, in order.

        Raises:
            InvalidTransition: the event has no edge here, or is one that only the machine derives; nothing changed.
        """
        if isinstance(event, AllLanded | CountsDiffered):
            raise InvalidTransition("receiver session", self.state, event)
        return self._take(event, now)

    def _take(self, event: ReceiverEvent, now: float) -> list[ReceiverEffect]:
        before = self.state
        try:
            after = EDGES[before][type(event)]
        except KeyError:
            raise InvalidTransition("receiver session", before, event) from None
        self.state = after
        if before.is_terminal or before is ReceiveState.LANDED:
            return self._answer_late(event)
        if after.is_terminal:
            return self._fail(event, before)
        effects = self._learn(event, now)
        if derived := self._derive():
            return effects + self._take(derived, now)
        return effects

    def check(self) -> None:
        """Assert the invariants that tie what is known to the state."""
        state = self.state
        waits = not state.is_terminal and state is not ReceiveState.LANDED
        assert (self._expires_at is not None) == waits, state
        if state in (ReceiveState.RESERVED, ReceiveState.SENDING, ReceiveState.LANDED, ReceiveState.ACKED):
            assert self._expected is not None
            assert self._offer is not None
        if state in (ReceiveState.LANDED, ReceiveState.ACKED):
            assert self._commit is not None
            assert self._commit.num_frames == self._written.num_frames
            assert self._verdict is None
        if state in (ReceiveState.ABORTED, ReceiveState.EXPIRED):
            assert self._verdict is not None

    def _learn(self, event: ReceiverEvent, now: float) -> list[ReceiverEffect]:
        """Keep what an event of a live session says; every one of them proves that somebody lives."""
        match event:
            case Expected():
                self._expected = event
            case OfferReceived() if self._offer is None:
                self._offer = event
                self._offered_at = now
            case OfferReceived() if self.state is not ReceiveState.RESERVED:
                return []
            case LinkLost():
                return []  # a sign of trouble, not of life
            case FramesWritten():
                self._written = event
            case CommitReceived() if self._commit is None and self._offer is not None and self._expected is not None:
                self._commit = event
                self._committed_at = max(self._offered_at, now - event.waited_s)
                if event.kept_tokens is not None:
                    self._expires_at = now + self._expected.lease_s
                    return [NeedOnly(event.kept_tokens)]
            case AllLanded():
                return self._land(now)
            case _:
                pass
        if self._expected is not None and self._offer is not None:
            self._expires_at = now + self._expected.lease_s
            if isinstance(event, Expected | OfferReceived) and _contradiction(self._expected, self._offer) is None:
                return [SayReserved(self._expected.held_tokens, self._expected.lease_s)]
        return []

    def _derive(self) -> AllLanded | CountsDiffered | None:
        """Return the event that follows from what is known now. Pure."""
        expected, offer, commit, written = self._expected, self._offer, self._commit, self._written
        if self.state is ReceiveState.LANDED or expected is None or offer is None:
            return None
        if contradiction := _contradiction(expected, offer):
            return contradiction
        if commit is None:
            return None
        if commit.kept_tokens is not None and commit.kept_tokens > expected.num_tokens - expected.held_tokens:
            detail = f"kept {commit.kept_tokens} tokens of {expected.num_tokens - expected.held_tokens}"
            return CountsDiffered(NackReason.LENGTH, detail)
        if written.num_frames < commit.num_frames or written.kept_tokens != commit.kept_tokens:
            return None
        is_covered = written.is_covered or expected.held_tokens == expected.num_tokens
        if written.num_frames > commit.num_frames or written.payload_bytes != commit.payload_bytes or not is_covered:
            return CountsDiffered(
                NackReason.LENGTH,
                f"committed {commit.num_frames} frames of {commit.payload_bytes} bytes, "
                f"wrote {written.num_frames} of {written.payload_bytes}, {'all' if is_covered else 'not all'} covered",
            )
        return AllLanded()

    def _land(self, now: float) -> list[ReceiverEffect]:
        assert self._commit is not None
        self._expires_at = None
        exposed_s = now - self._committed_at
        report = ReportLanded(
            first_token_id=self._commit.first_token_id,
            written=self._written,
            profile=self._commit.profile,
            kept_tokens=self._commit.kept_tokens,
            transfer_s=now - self._offered_at,
            exposed_s=exposed_s,
        )
        return [SayAck(exposed_s), report]

    def _fail(self, event: ReceiverEvent, before: ReceiveState) -> list[ReceiverEffect]:
        self._expires_at = None
        reason, detail, is_told = _verdict(event, before)
        self._verdict = (reason, detail)
        effects: list[ReceiverEffect] = [SayNack(reason, detail)] if is_told else []
        return [*effects, ReportFailed(reason, detail)] if self._expected is not None else effects

    def _answer_late(self, event: ReceiverEvent) -> list[ReceiverEffect]:
        if self._verdict is not None:
            return [SayNack(*self._verdict)] if isinstance(event, OfferReceived | CommitReceived) else []
        return [SayAck(0.0)] if isinstance(event, CommitReceived) else []


def _contradiction(expected: Expected, offer: OfferReceived) -> CountsDiffered | None:
    """Return why an offer is not of what was reserved, None when it is. Pure."""
    if offer.request_id != expected.request_id:
        return CountsDiffered(NackReason.PROTOCOL, f"offered {offer.request_id}, reserved for {expected.request_id}")
    if offer.bytes_per_token != expected.bytes_per_token:
        detail = f"offered {offer.bytes_per_token} bytes per token, reserved {expected.bytes_per_token}"
        return CountsDiffered(NackReason.LAYOUT, detail)
    if offer.heads != expected.heads:
        return CountsDiffered(NackReason.LAYOUT, f"offered heads {offer.heads}, reserved for {expected.heads}")
    if offer.num_tokens != expected.num_tokens:
        detail = f"offered {offer.num_tokens} tokens, reserved for {expected.num_tokens}"
        return CountsDiffered(NackReason.LENGTH, detail)
    return None


def _verdict(event: ReceiverEvent, before: ReceiveState) -> tuple[NackReason, str, bool]:
    """Return why the session ends, and whether the sender has to be told. Pure."""
    match event:
        case FrameWasRefused(reason, detail) | Cancelled(reason, detail) | CountsDiffered(reason, detail):
            return reason, detail, True
        case AbortReceived(reason):
            return reason, "aborted by the sender", False
        case LinkLost(detail):
            return NackReason.LINK_LOST, detail, True
        case StreamLost(detail):
            return NackReason.PEER_LOST, detail, False
        case DeadlinePassed() if before is ReceiveState.OFFERED:
            return NackReason.UNKNOWN_TRANSFER, "nobody here expects it", True
        case DeadlinePassed():
            return NackReason.LEASE_EXPIRED, f"nothing was heard while {before}", True
        case _:
            raise AssertionError(f"{type(event).__name__} ends nothing")
