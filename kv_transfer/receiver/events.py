"""What the receiver's session machine is told (events, in the past tense) and asks for (effects, in the imperative)."""

from dataclasses import dataclass

from core.ids import RequestId
from kv_transfer.session import NackReason

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """The owner reserved blocks for [held_tokens, num_tokens)."""

    request_id: RequestId
    held_tokens: int
    num_tokens: int
    bytes_per_token: int
    lease_s: float
    heads: range | None = None  # of the shard; None: all


@dataclass(frozen=True, slots=True)
class OfferReceived:
    request_id: RequestId
    num_tokens: int
    bytes_per_token: int
    heads: range | None = None


@dataclass(frozen=True, slots=True)
class FramesWritten:
    """Totals so far, told after frames were verified and written.

    Attributes:
        payload_bytes: as coded.
        is_covered: nothing of the reservation is missing.
        raw_bytes: of KV, before coding.
        is_exact: no frame so far could have lost a bit.
        kept_tokens: `is_covered` is judged by so many tokens past the held prefix; None: by all.
    """

    num_frames: int
    payload_bytes: int
    is_covered: bool
    raw_bytes: int = 0
    is_exact: bool = True
    kept_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class FrameWasRefused:
    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True)
class CommitReceived:
    num_frames: int
    payload_bytes: int
    first_token_id: int
    profile: str = "none"  # its name, for people
    kept_tokens: int | None = None  # past the held prefix, when some were left out
    waited_s: float = 0.0  # on the sender's side, since the prefill ended; finite, not negative


@dataclass(frozen=True, slots=True)
class AllLanded:
    """Derived: commit and frames agree and cover the reservation."""


@dataclass(frozen=True, slots=True)
class CountsDiffered:
    """Derived: commit, offer, frames and reservation cannot all be true."""

    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True)
class AckSaid:
    pass


@dataclass(frozen=True, slots=True)
class AbortReceived:
    reason: NackReason


@dataclass(frozen=True, slots=True)
class Cancelled:
    """This side gives up: its owner asked."""

    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    pass


@dataclass(frozen=True, slots=True)
class LinkLost:
    detail: str


@dataclass(frozen=True, slots=True)
class StreamLost:
    detail: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    pass


ReceiverEvent = (
    Expected
    | OfferReceived
    | FramesWritten
    | FrameWasRefused
    | CommitReceived
    | AllLanded
    | CountsDiffered
    | AckSaid
    | AbortReceived
    | Cancelled
    | LeaseRenewed
    | LinkLost
    | StreamLost
    | DeadlinePassed
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SayReserved:
    """Let frames in, and tell the sender what is held here."""

    held_tokens: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class SayAck:
    exposed_s: float


@dataclass(frozen=True, slots=True)
class SayNack:
    reason: NackReason
    detail: str


@dataclass(frozen=True, slots=True)
class NeedOnly:
    """Judge what is written by so many tokens from now on, and tell it again."""

    kept_tokens: int


@dataclass(frozen=True, slots=True)
class ReportLanded:
    """Stop writing, then tell the owner."""

    first_token_id: int
    written: FramesWritten
    profile: str
    transfer_s: float
    exposed_s: float
    kept_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """Stop writing, then tell the owner."""

    reason: NackReason
    detail: str


ReceiverEffect = SayReserved | SayAck | SayNack | NeedOnly | ReportLanded | ReportFailed
