"""What the event loop and the sender thread of a pair hand to each other."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from core.ids import RequestId, TransferId
from kv_transfer.box import Box
from kv_transfer.codec import RAW, Encoder
from kv_transfer.gate import Gate
from kv_transfer.session import NackReason
from kv_transfer.token_selection import TokenSelection


@dataclass(frozen=True, slots=True)
class Commit:
    """The last thing that the owner pushes."""

    first_token_id: int


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer as the pump sees it. `gate` may be used from any thread; the rest belongs to the pump.

    Attributes:
        heads: that this sender brings, global.
        encoder: chosen when the transfer is reserved, and then never changed.
        expected_bytes: estimate of all its payload, as coded.
        selection: which tokens are sent, once the whole prompt is computed; None: all, as they are computed.
        kept: int64, their positions, when they have been chosen. Boxes then count kept tokens: those held, then these.
    """

    transfer_id: TransferId
    request_id: RequestId
    num_tokens: int
    heads: range
    encoder: Encoder = RAW
    selection: TokenSelection | None = None
    kept: Tensor | None = None
    frame_raw_bytes: int = 0  # how much KV a coded frame should hold
    expected_bytes: int = 0
    gate: Gate = field(default_factory=Gate)
    held_tokens: int | None = None  # None: not reserved yet
    waiting: list[Box | Commit] = field(default_factory=list)
    link_epoch: int | None = None  # of its first frame; frames never continue on another link
    last_link_bytes: int = 0  # payload that the link had been given with its last frame
    num_frames: int = 0
    payload_bytes: int = 0
    has_moved: bool = False  # to another link, because the first turned out to be broken

    @property
    def first_token(self) -> int:
        """First token to send; 0 while that is not known."""
        return self.held_tokens or 0


@dataclass(frozen=True, slots=True)
class OpenedLink:
    """The receiver's answer to an OpenLink."""

    link_epoch: int
    address: str
    slot_bytes: int
    backend: str


class PumpHooks(Protocol):
    """Told on the pump's thread; must not block."""

    def on_first_frame(self, outgoing: Outgoing) -> None: ...

    def on_all_sent(self, outgoing: Outgoing, first_token_id: int) -> None: ...

    def on_failed(self, outgoing: Outgoing, reason: NackReason, detail: str) -> None:
        """This transfer cannot go on."""
        ...

    def on_link_lost(self, detail: str, *, is_unreachable: bool) -> None:
        """Frames of other transfers may be lost too. `is_unreachable`: the peer did not come to open it."""
        ...

    def on_link_needed(self, link_epoch: int) -> None:
        """Ask the receiver to open; `link_opened` is awaited."""
        ...
