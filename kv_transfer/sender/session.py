"""The sender's half of one transfer, as a machine: events in, effects out, no I/O, no clock of its own.

Life cycle::

    OFFERED --ReservationGranted--> RESERVED --FrameSent--> SENDING --AllSent--> COMMITTED --AckReceived--> ACKED
       any of these may end in ABORTED (either owner, the receiver, the link, the stream) or in EXPIRED (silence)

COMMITTED is as far as the sender can see towards LANDED: everything left and the commit was said, the receiver decides.
The shell (`sender`) feeds events on its event loop, performs the effects in order, and calls `tick` at `next_deadline`.
"""

from collections.abc import Mapping
from enum import StrEnum

from core.errors import InvalidTransition
from core.ids import TransferId
from kv_transfer.sender.events import (
    Aborted,
    AckReceived,
    AllSent,
    DeadlinePassed,
    FrameSent,
    LinkLost,
    LinkMoved,
    NackReceived,
    ReceiverLostLink,
    RenewalDue,
    ReportAcked,
    ReportFailed,
    ReservationGranted,
    SayAbort,
    SayCommit,
    SayRenewal,
    SenderEffect,
    SenderEvent,
    StartSending,
    StreamLost,
)
from kv_transfer.session import NackReason

RENEWALS_PER_LEASE = 3
_MIN_RENEWAL_S = 0.01  # whatever lease is granted


class SendState(StrEnum):
    OFFERED = "offered"
    RESERVED = "reserved"
    SENDING = "sending"
    COMMITTED = "committed"
    ACKED = "acked"
    ABORTED = "aborted"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self in (SendState.ACKED, SendState.ABORTED, SendState.EXPIRED)


_S = SendState

EDGES: Mapping[SendState, Mapping[type, SendState]] = {
    _S.OFFERED: {
        ReservationGranted: _S.RESERVED,  # the decode worker has blocks, and told what it holds
        NackReceived: _S.ABORTED,  # it will not take it: full, unknown, other layout
        Aborted: _S.ABORTED,  # disconnect, or the first token ended the request
        LinkLost: _S.OFFERED,  # nothing of this transfer was on it
        StreamLost: _S.ABORTED,  # the decode worker is gone, or never was
        DeadlinePassed: _S.EXPIRED,  # no answer to the offer
    },
    _S.RESERVED: {
        ReservationGranted: _S.RESERVED,  # duplicate
        FrameSent: _S.SENDING,  # the first part was gathered and handed to the link
        AllSent: _S.COMMITTED,  # the decode worker holds all of it: zero frames
        NackReceived: _S.ABORTED,  # cancelled, or its lease expired
        Aborted: _S.ABORTED,
        LinkLost: _S.RESERVED,  # nothing of this transfer was on it: it goes on over the next
        ReceiverLostLink: _S.ABORTED,  # its first frame was on it, and the news of that is still under way
        StreamLost: _S.ABORTED,
        LinkMoved: _S.RESERVED,  # the news of its first frame is still under way
        RenewalDue: _S.RESERVED,  # the prefill is computing
    },
    _S.SENDING: {
        ReservationGranted: _S.SENDING,  # duplicate
        FrameSent: _S.SENDING,  # duplicate
        AllSent: _S.COMMITTED,  # the prefill ended and its last part left
        NackReceived: _S.ABORTED,  # a frame was refused, or the request was cancelled there
        Aborted: _S.ABORTED,
        LinkLost: _S.ABORTED,  # frames are gone
        ReceiverLostLink: _S.ABORTED,
        StreamLost: _S.ABORTED,
        LinkMoved: _S.SENDING,
        RenewalDue: _S.SENDING,  # later chunks are computing
    },
    _S.COMMITTED: {
        ReservationGranted: _S.COMMITTED,  # duplicate
        FrameSent: _S.COMMITTED,  # reordered on the way from the sender thread
        AckReceived: _S.ACKED,  # landed
        NackReceived: _S.ABORTED,  # a frame was refused, or the frames do not add up
        Aborted: _S.ABORTED,
        LinkLost: _S.COMMITTED,  # perhaps everything arrived before: only the receiver knows, and it answers
        ReceiverLostLink: _S.ABORTED,  # an ACK would have come before this
        StreamLost: _S.ABORTED,
        LinkMoved: _S.COMMITTED,  # a slow wire is not a dead one: another lease
        RenewalDue: _S.COMMITTED,  # frames are on a slow wire
        DeadlinePassed: _S.EXPIRED,  # no verdict within a lease
    },
    # After the end: what was on its way may still arrive, and changes nothing.
    **{
        state: {
            ReservationGranted: state,
            FrameSent: state,
            AllSent: state,
            AckReceived: state,
            NackReceived: state,
            Aborted: state,
            LinkLost: state,
            ReceiverLostLink: state,
            LinkMoved: state,
            StreamLost: state,
        }
        for state in (_S.ACKED, _S.ABORTED, _S.EXPIRED)
    },
}


class SenderSession:
    """One transfer as the prefill worker sees it. Not thread-safe: one event loop feeds it."""

    def __init__(self, transfer_id: TransferId, *, offer_timeout_s: float, now: float) -> None:
        """The offer is being said now."""
        self.transfer_id = transfer_id
        self.state = SendState.OFFERED
        self._lease_s = 0.0  # until the receiver grants one
        self._expires_at: float | None = now + offer_timeout_s
        self._renew_at: float | None = None

    def next_deadline(self) -> float | None:
        """Return when `tick` has something to do, None when never. Pure."""
        pending = [at for at in (self._expires_at, self._renew_at) if at is not None]
        return min(pending, default=None)

    def tick(self, now: float) -> list[SenderEffect]:
        """Let pass what is due."""
        if self._expires_at is not None and now >= self._expires_at:
            return self.handle(DeadlinePassed(), now)
        if self._renew_at is not None and now >= self._renew_at:
            return self.handle(RenewalDue(), now)
        return []

    def handle(self, event: SenderEvent, now: float) -> list[SenderEffect]:
        """Take one event; return what the shell must do, in order.

        Raises:
            InvalidTransition: the event has no edge here; nothing changed.
        """
        before = self.state
        try:
            after = EDGES[before][type(event)]
        except KeyError:
            raise InvalidTransition("sender session", before, event) from None
        self.state = after
        if before.is_terminal:
            return []
        if after.is_terminal:
            self._expires_at = self._renew_at = None
            return _farewell(before, event)
        match event:
            case ReservationGranted(held_tokens, lease_s) if before is SendState.OFFERED:
                self._lease_s = lease_s
                self._expires_at = None
                self._schedule_renewal(now)
                return [StartSending(held_tokens)]
            case AllSent(num_frames, payload_bytes, first_token_id):
                self._expires_at = now + self._lease_s
                return [SayCommit(num_frames, payload_bytes, first_token_id)]
            case LinkMoved() if after is SendState.COMMITTED:
                self._expires_at = now + self._lease_s
                return []
            case RenewalDue():
                self._schedule_renewal(now)
                return [SayRenewal()]
            case _:
                return []

    def check(self) -> None:
        """Assert the invariants that tie deadlines to the state."""
        can_expire = DeadlinePassed in EDGES[self.state]
        can_renew = RenewalDue in EDGES[self.state]
        assert (self._expires_at is not None) == can_expire, self.state
        assert (self._renew_at is not None) == can_renew, self.state

    def _schedule_renewal(self, now: float) -> None:
        self._renew_at = now + max(self._lease_s / RENEWALS_PER_LEASE, _MIN_RENEWAL_S)


def _farewell(before: SendState, event: SenderEvent) -> list[SenderEffect]:
    match event:
        case AckReceived(exposed_s):
            return [ReportAcked(exposed_s)]
        case NackReceived(reason, detail):
            return [ReportFailed(reason, detail)]
        case Aborted(reason, detail):
            return [SayAbort(reason), ReportFailed(reason, detail)]
        case LinkLost(detail) | ReceiverLostLink(detail):
            return [SayAbort(NackReason.LINK_LOST), ReportFailed(NackReason.LINK_LOST, detail)]
        case StreamLost(detail):
            return [ReportFailed(NackReason.PEER_LOST, detail)]
        case DeadlinePassed():
            detail = f"no answer from the receiver while {before}"
            return [SayAbort(NackReason.LEASE_EXPIRED), ReportFailed(NackReason.LEASE_EXPIRED, detail)]
        case _:
            raise AssertionError(f"{type(event).__name__} ends nothing")
