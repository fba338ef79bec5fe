"""What the sender's session machine is told (events, in the past tense) and asks for (effects, in the imperative)."""

from dataclasses import dataclass

from kv_transfer.session import NackReason

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReservationGranted:
    held_tokens: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class FrameSent:
    """The first frame was handed to the link; later ones need not be told."""


@dataclass(frozen=True, slots=True)
class AllSent:
    """The owner committed, and every part that it pushed was handed to the link."""

    num_frames: int
    payload_bytes: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class AckReceived:
    exposed_s: float  # as the receiver measured it


@dataclass(frozen=True, slots=True)
class NackReceived:
    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """This side gives up: its owner asked, or its pool refused a read."""

    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """This side's end broke; the receiver's end will notice too."""

    detail: str


@dataclass(frozen=True, slots=True)
class ReceiverLostLink:
    """The receiver says that its end broke, and frames of this transfer were on it."""

    detail: str


@dataclass(frozen=True, slots=True)
class LinkMoved:
    """The receiver took more from the link, and frames of this transfer are still on it."""


@dataclass(frozen=True, slots=True)
class StreamLost:
    detail: str


@dataclass(frozen=True, slots=True)
class RenewalDue:
    pass


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    pass


SenderEvent = (
    ReservationGranted
    | FrameSent
    | AllSent
    | AckReceived
    | NackReceived
    | Aborted
    | LinkLost
    | ReceiverLostLink
    | LinkMoved
    | StreamLost
    | RenewalDue
    | DeadlinePassed
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartSending:
    """Hand parts to the link, cut at `held_tokens`."""

    held_tokens: int


@dataclass(frozen=True, slots=True)
class SayCommit:
    num_frames: int
    payload_bytes: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class SayAbort:
    reason: NackReason


@dataclass(frozen=True, slots=True)
class SayRenewal:
    pass


@dataclass(frozen=True, slots=True)
class ReportAcked:
    """Stop reading, then tell the owner."""

    exposed_s: float


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """Stop reading, then tell the owner."""

    reason: NackReason
    detail: str


SenderEffect = StartSending | SayCommit | SayAbort | SayRenewal | ReportAcked | ReportFailed
