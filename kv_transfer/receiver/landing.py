"""Where a frame becomes KV in the pool: every check between bytes that arrived and `write_kv`.

The order is fixed. `admit`: the frame is intact (`frame.decode`), it was written for this link and these incarnations,
its transfer is alive, it fits the model's layout, its codec is known, its box was reserved and has not come before;
then its box is claimed. `write`: it is decoded and written; only then accounted for. Any failure refuses the frame and
ends its transfer; frames of transfers that have ended already are drained and dropped, because their blocks may be
somebody else's by now.

The two halves may run on different threads: a coded frame leaves its slot as soon as it is admitted, and is written by
a codec thread. Nothing that a frame brings is of use before everything is written.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from core.errors import ServingError
from core.ids import RequestId, TransferId
from core.layout import KvLayout
from kv_transfer.box import Box
from kv_transfer.codec import RAW, TORCH_DTYPES, Decoder
from kv_transfer.frame import FrameHeader, FrameRefused, decode, section_spans
from kv_transfer.gate import Gate
from kv_transfer.link import Slot
from kv_transfer.ports import KvWriter
from kv_transfer.receiver.coverage import Coverage
from kv_transfer.receiver.events import FramesWritten
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
    """One transfer as the threads of the receiver see it.

    Any thread may use `gate`, `account` and read `written`; `coverage` is the receiver thread's own. What was written
    is published as one immutable fact in one store, so that a reader never sees the frames of now with the bytes of
    before.
    """

    transfer_id: TransferId
    request_id: RequestId
    coverage: Coverage
    gate: Gate = field(default_factory=Gate)
    written: FramesWritten = _NOTHING_WRITTEN
    told_frames: int = 0  # the event loop's own note
    _volume: int = 0
    _last_token: int = 0  # of what was written, exclusive
    _kept_tokens: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def account(self, header: FrameHeader, *, is_exact: bool) -> FramesWritten:
        """Add a frame that was written; return the totals with it."""
        payload_bytes = header.payload_bytes
        with self._lock:
            self._volume += header.box.volume
            self._last_token = max(self._last_token, header.box.tokens.stop)
            before = self.written
            self.written = FramesWritten(
                num_frames=before.num_frames + 1,
                payload_bytes=before.payload_bytes + payload_bytes,
                is_covered=self._is_covered(),
                raw_bytes=before.raw_bytes + header.raw_bytes,
                is_exact=before.is_exact and is_exact,
                kept_tokens=self._kept_tokens,
            )
            return self.written

    def narrow(self, kept_tokens: int) -> FramesWritten:
        """Need only the first `kept_tokens` tokens of the target from now on; return the totals, judged by that."""
        with self._lock:
            self._kept_tokens = kept_tokens
            self.written = replace(self.written, is_covered=self._is_covered(), kept_tokens=kept_tokens)
            return self.written

    def _is_covered(self) -> bool:
        """Whether everything that is needed was written. What was written never overlaps, so that volumes tell."""
        target = self.coverage.target
        if self._kept_tokens is None or target is None:
            return self._volume == self.coverage.volume
        last = target.tokens.start + self._kept_tokens
        return self._last_token <= last and self._volume == target.volume // len(target.tokens) * self._kept_tokens


@dataclass(frozen=True, slots=True)
class Arrival:
    """A frame that was verified and whose box is claimed: it may be written, once."""

    header: FrameHeader
    landing: Landing
    decoder: Decoder

    @property
    def is_raw(self) -> bool:
        """The payload is the tensor: nothing to decode, so it may be written right from its slot."""
        return self.header.codec_id == RAW.codec_id


class LandingZone:
    """Lands the frames of one link into the pool. `admit` is for one thread, `write` for any.

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

    def admit(self, slot: Slot) -> tuple[FrameHeader, Arrival | None]:
        """Verify the frame in `slot` and claim its box.

        Returns:
            Its header, and what to write: None for a late frame.

        Raises:
            FrameRefused: nothing was claimed.
        """
        header = decode(slot.view())
        try:
            return header, self._claim(header)
        except FrameRefused as refused:
            raise FrameRefused(refused.reason, refused.detail, header.transfer_id) from refused

    def write(self, arrival: Arrival, payload: Tensor) -> FramesWritten | None:
        """Decode an admitted frame, write it and account for it.

        Args:
            payload: uint8, 64-byte aligned, at least as long as the header says; only lent for the call.

        Returns:
            The totals of its transfer; None when that has ended meanwhile.

        Raises:
            FrameRefused: nothing was written, or (POOL) the pool refused to.
        """
        try:
            return self._write(arrival, payload)
        except FrameRefused as refused:
            raise FrameRefused(refused.reason, refused.detail, arrival.header.transfer_id) from refused

    def _claim(self, header: FrameHeader) -> Arrival | None:
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
            raise FrameRefused(NackReason.DUPLICATE, f"of {_words(header.box)} something came before")
        landing.coverage.claim(header.box)
        return Arrival(header, landing, decoder)

    def _write(self, arrival: Arrival, payload: Tensor) -> FramesWritten | None:
        header, landing = arrival.header, arrival.landing
        if landing.gate.is_closed:
            return None
        sections = [payload[span.start : span.stop] for span in section_spans(header.section_bytes)]
        try:
            kv = arrival.decoder.decode(header.codec_params, sections, header.shape, TORCH_DTYPES[header.dtype])
            is_exact = arrival.decoder.is_exact(header.codec_params)
        except FrameRefused:
            raise
        except Exception as error:  # a decoder that crashes on a frame has refused it; the thread serves others
            _log.exception("decoding a frame of %s", header.transfer_id)
            raise FrameRefused(NackReason.CODEC, f"{type(error).__name__}: {error}") from error
        heads = None if len(header.box.heads) == self._layout.num_kv_heads else header.box.heads
        if not landing.gate.enter():
            return None
        try:
            self._writer.write_kv(landing.request_id, header.box.layers, header.box.tokens, kv, heads=heads)
        except ServingError as error:
            raise FrameRefused(NackReason.POOL, str(error)) from error
        except Exception as error:  # a defect of the pool ends this transfer and is told; the thread serves others
            _log.exception("writing KV of %s", header.transfer_id)
            raise FrameRefused(NackReason.POOL, f"{type(error).__name__}: {error}") from error
        finally:
            landing.gate.leave()
        return landing.account(header, is_exact=is_exact)

    def _check_shape(self, header: FrameHeader) -> None:
        layout = self._layout
        if (
            header.head_dim != layout.head_dim
            or header.dtype != layout.dtype
            or header.box.layers.stop > layout.num_layers
            or header.box.heads.stop > layout.num_kv_heads
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
