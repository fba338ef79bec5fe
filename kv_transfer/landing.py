"""Where a frame becomes KV in the pool: every check between bytes that arrived and `write_kv`.

The order is fixed: the frame is intact (`frame.decode`), it was written for this link and these incarnations, its
transfer is alive, it fits the model's layout, its codec is known, its box was reserved and has not been written; then
it is decoded and written; only then accounted for. Any failure refuses the frame and ends its transfer; frames of
transfers that have ended already are drained and dropped, because their blocks may be somebody else's by now.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import ServingError
from core.ids import RequestId, TransferId
from core.layout import KvLayout
from kv_transfer.box import Box
from kv_transfer.codec import TORCH_DTYPES, Decoder
from kv_transfer.coverage import Coverage
from kv_transfer.frame import HEADER_BYTES, FrameHeader, FrameRefused, decode, section_spans
from kv_transfer.gate import Gate
from kv_transfer.link import Slot
from kv_transfer.ports import KvWriter
from kv_transfer.receiver_events import FramesWritten
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)
_NOTHING_WRITTEN = FramesWritten(0, 0, is_covered=False)


@dataclass(frozen=True, slots=True)
class FrameStamp:
    """The epochs that every frame of a link must carry."""

    sender_epoch: int
    receiver_epoch: int
    link_epoch: int


@dataclass(slots=True, eq=False)
class Landing:
    """One transfer as the receiver thread sees it.

    Any thread may use `gate` and read `written`; `coverage` is the receiver thread's own. What was written is published
    as one immutable fact in one store, so that a reader never sees the frames of now with the bytes of before.
    """

    transfer_id: TransferId
    request_id: RequestId
    coverage: Coverage
    gate: Gate = field(default_factory=Gate)
    written: FramesWritten = _NOTHING_WRITTEN
    told_frames: int = 0  # the event loop's own note


class LandingZone:
    """Lands the frames of one link into the pool. Used by one thread.

    `landings` is shared with the event loop, which adds a transfer when it is reserved and removes it when it ends.
    """

    def __init__(
        self,
        stamp: FrameStamp,
        layout: KvLayout,
        writer: KvWriter,
        decoders: Mapping[int, Decoder],
        landings: Mapping[TransferId, Landing],
    ) -> None:
        self._stamp = stamp
        self._layout = layout
        self._writer = writer
        self._decoders = decoders
        self._landings = landings

    def land(self, slot: Slot) -> tuple[FrameHeader, Landing | None]:
        """Verify and write the frame in `slot`.

        Returns:
            Its header, and the transfer that it was written for: None for a late frame.

        Raises:
            FrameRefused: nothing was written, or (POOL) the pool refused to.
        """
        header = decode(slot.view())
        try:
            return header, self._write(header, slot)
        except FrameRefused as refused:
            raise FrameRefused(refused.reason, refused.detail, header.transfer_id) from refused

    def _write(self, header: FrameHeader, slot: Slot) -> Landing | None:
        if FrameStamp(header.sender_epoch, header.receiver_epoch, header.link_epoch) != self._stamp:
            raise FrameRefused(NackReason.EPOCH, "written for another link or another incarnation")
        landing = self._landings.get(header.transfer_id)
        if landing is None or landing.gate.is_closed:
            return None
        self._check_shape(header)
        decoder = self._decoders.get(header.codec_id)
        if decoder is None:
            raise FrameRefused(NackReason.CODEC, f"codec {header.codec_id} is not known here")
        if not landing.coverage.is_inside(header.box):
            raise FrameRefused(NackReason.RANGE, f"{_words(header.box)} is not in the reservation")
        if landing.coverage.overlaps(header.box):
            raise FrameRefused(NackReason.DUPLICATE, f"of {_words(header.box)} something was written before")
        payload = slot.memory[HEADER_BYTES:]
        sections = [payload[span.start : span.stop] for span in section_spans(header.section_bytes)]
        dtype = TORCH_DTYPES[header.dtype]
        kv = decoder.decode(header.codec_params, sections, header.shape, dtype)
        if not landing.gate.enter():
            return None
        try:
            self._writer.write_kv(landing.request_id, header.box.layers, header.box.tokens, kv)
        except ServingError as error:
            raise FrameRefused(NackReason.POOL, str(error)) from error
        except Exception as error:  # a defect of the pool ends this transfer and is told; the thread serves others
            _log.exception("writing KV of %s", header.transfer_id)
            raise FrameRefused(NackReason.POOL, f"{type(error).__name__}: {error}") from error
        finally:
            landing.gate.leave()
        landing.coverage.add(header.box)
        before = landing.written
        landing.written = FramesWritten(
            before.num_frames + 1, before.payload_bytes + header.payload_bytes, landing.coverage.is_complete
        )
        return landing

    def _check_shape(self, header: FrameHeader) -> None:
        layout = self._layout
        # All heads at once for now: a sharded sender needs a writer port that takes a head range.
        if (
            header.head_dim != layout.head_dim
            or header.dtype != layout.dtype
            or header.box.layers.stop > layout.num_layers
            or header.box.heads != range(layout.num_kv_heads)
        ):
            raise FrameRefused(
                NackReason.SHAPE,
                f"{_words(header.box)} of {header.dtype}[{header.head_dim}] does not fit "
                f"{layout.num_layers} layers, {layout.num_kv_heads} heads of {layout.dtype}[{layout.head_dim}]",
            )


def _words(box: Box) -> str:
    return (
        f"layers {box.layers.start}..{box.layers.stop}, heads {box.heads.start}..{box.heads.stop}, "
        f"tokens {box.tokens.start}..{box.tokens.stop}"
    )
