"""From a box in the pool to the payload of a frame: gather, then encode. For the sender thread and for codec threads.

Raw KV is gathered right into the slot, by the sender thread. Coded frames are made ahead by codec threads, several at a
time, each into memory of its own; who makes them in which order is no matter, `pump` sends them in order.

The gate of the transfer is held while the pool is read and not longer: an abort never waits for an encoder.
"""

import logging
import threading
from collections.abc import Callable

from torch import Tensor

from core.errors import ServingError, TransferError
from core.layout import DTYPE_BYTES, KvLayout
from kv_transfer.box import Box
from kv_transfer.codec import TORCH_DTYPES, Encoded, Encoder, FramePlace
from kv_transfer.codec_threads import Buffers, Scratch
from kv_transfer.frame import MAX_PARAMS_BYTES, MAX_SECTIONS, section_spans
from kv_transfer.ports import KvReader, TokenReader
from kv_transfer.sender.outgoing import Outgoing
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)


class EncodeFailed(TransferError):
    """A frame could not be made: the pool or the encoder refused. The transfer cannot go on."""

    def __init__(self, reason: NackReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.nack_reason = reason
        self.detail = detail


class FrameEncoder:
    """Gathers and encodes. `encode` from any thread."""

    def __init__(self, layout: KvLayout, reader: KvReader, tokens: TokenReader | None = None) -> None:
        self._layout = layout
        self._reader = reader
        self._tokens = tokens
        self._dtype = TORCH_DTYPES[layout.dtype]
        self._scratch = Scratch()
        self.cell_bytes = 2 * layout.head_dim * DTYPE_BYTES[layout.dtype]

    def encode(self, outgoing: Outgoing, box: Box, payload: Tensor) -> Encoded | None:
        """Leave the sections of a box in `payload`, which is at least `max_payload_bytes` long.

        Returns:
            None when the transfer has ended: nothing was read.

        Raises:
            EncodeFailed: POOL, CODEC.
        """
        encoder, layout = outgoing.encoder, self._layout
        raw_bytes = box.volume * self.cell_bytes
        shape = (len(box.layers), 2, len(box.heads), len(box.tokens), layout.head_dim)
        room = payload if encoder.is_identity else self._scratch.room(raw_bytes)
        out = room[:raw_bytes].view(self._dtype).view(shape)
        if not outgoing.gate.enter():
            return None
        try:
            self._gather(outgoing, box, out)
        finally:
            outgoing.gate.leave()
        num_tokens = outgoing.num_tokens if outgoing.kept is None else outgoing.first_token + len(outgoing.kept)
        place = FramePlace(box, num_tokens, layout.num_layers, layout.num_kv_heads)
        try:
            encoded = encoder.encode(out, payload, place)
        except Exception as error:  # whatever an encoder does ends this transfer and is told; others go on
            _log.exception("encoding KV of %s", outgoing.transfer_id)
            raise EncodeFailed(NackReason.CODEC, f"{type(error).__name__}: {error}") from error
        spans = section_spans(encoded.section_bytes)
        num_bytes = spans[-1].stop if spans else 0
        if len(spans) > MAX_SECTIONS or len(encoded.params) > MAX_PARAMS_BYTES or num_bytes > payload.numel():
            raise EncodeFailed(NackReason.CODEC, f"codec {encoder.codec_id} made what does not fit into a frame")
        return encoded

    def select(self, outgoing: Outgoing) -> Box | None:
        """Choose the tokens of a transfer whose prompt is computed; return the box of what is to be sent.

        Returns:
            None when the transfer has ended.

        Raises:
            EncodeFailed: POOL.
        """
        first = outgoing.first_token
        layers = range(self._layout.num_layers)
        scores: Tensor | None = None
        if not outgoing.gate.enter():
            return None
        try:
            if self._tokens is not None:
                scores = self._tokens.score_tokens(outgoing.request_id)
        except ServingError as error:
            raise EncodeFailed(NackReason.POOL, str(error)) from error
        except Exception as error:  # as in `_gather`
            _log.exception("scoring the tokens of %s", outgoing.transfer_id)
            raise EncodeFailed(NackReason.POOL, f"{type(error).__name__}: {error}") from error
        finally:
            outgoing.gate.leave()
        if scores is None or outgoing.selection is None:
            return Box(layers, outgoing.heads, range(first, outgoing.num_tokens))
        outgoing.kept = outgoing.selection.select(scores, first)
        return Box(layers, outgoing.heads, range(first, first + len(outgoing.kept)))

    def _gather(self, outgoing: Outgoing, box: Box, out: Tensor) -> None:
        heads = None if len(box.heads) == self._layout.num_kv_heads else box.heads
        try:
            if outgoing.kept is not None and self._tokens is not None:
                first = outgoing.first_token
                kept = outgoing.kept[box.tokens.start - first : box.tokens.stop - first]
                kv = out.copy_(self._tokens.read_tokens(outgoing.request_id, box.layers, kept, box.heads))
            else:
                kv = self._reader.read_kv(outgoing.request_id, box.layers, box.tokens, out, heads=heads)
        except ServingError as error:
            raise EncodeFailed(NackReason.POOL, str(error)) from error
        except Exception as error:  # a defect of the pool ends this transfer and is told; the thread serves others
            _log.exception("reading KV of %s", outgoing.transfer_id)
            raise EncodeFailed(NackReason.POOL, f"{type(error).__name__}: {error}") from error
        if kv.data_ptr() != out.data_ptr() or kv.shape != out.shape or kv.dtype != out.dtype:
            found = f"{tuple(kv.shape)} {kv.dtype}"
            raise EncodeFailed(NackReason.POOL, f"the pool gave {found} elsewhere, not {tuple(out.shape)} {out.dtype}")


def largest_raw_bytes(encoder: Encoder, room: int, limit: int) -> int:
    """Return how much KV, at most `limit`, an encoder can be trusted to fit into `room`. Pure."""
    if encoder.max_payload_bytes(limit) <= room:
        return limit
    fits, too_much = 0, limit
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        if encoder.max_payload_bytes(middle) <= room:
            fits = middle
        else:
            too_much = middle
    return fits


class EncodeJob:
    """One coded frame in the making. `run` on a codec thread, the rest on the sender thread."""

    def __init__(
        self, encoder: FrameEncoder, outgoing: Outgoing, box: Box, buffers: Buffers, on_done: Callable[[], None]
    ) -> None:
        """`on_done` tells any thread's news, with no lock held here."""
        self._encoder = encoder
        self._outgoing = outgoing
        self._box = box
        self._buffers = buffers
        self._on_done = on_done
        self._lock = threading.Lock()
        self._discarded = threading.Event()
        self.raw_bytes = box.volume * encoder.cell_bytes
        self._payload: Tensor | None = None
        self._encoded: Encoded | None = None
        self._failure: EncodeFailed | None = None
        self.is_done = False

    def run(self) -> None:
        if self._discarded.is_set():
            return
        payload: Tensor | None = None
        encoded: Encoded | None = None
        failure: EncodeFailed | None = None
        try:
            payload = self._buffers.lend(self._outgoing.encoder.max_payload_bytes(self.raw_bytes))
            encoded = self._encoder.encode(self._outgoing, self._box, payload)
        except EncodeFailed as error:
            failure = error
        except Exception as error:  # no memory, or a defect: the transfer must hear of it, or the sender would wait
            _log.exception("making a frame of %s", self._outgoing.transfer_id)
            failure = EncodeFailed(NackReason.CODEC, f"{type(error).__name__}: {error}")
        with self._lock:
            self._payload, self._encoded, self._failure = payload, encoded, failure
            self.is_done = True
            if self._discarded.is_set():
                self._free()
        self._on_done()

    def result(self) -> tuple[Tensor, Encoded] | None:
        """Return payload and sections of a job that is done; the memory is the job's until `discard`.

        Returns:
            None when the transfer had ended.

        Raises:
            EncodeFailed: as `FrameEncoder.encode`.
        """
        assert self.is_done
        if self._failure is not None:
            raise self._failure
        return None if self._encoded is None or self._payload is None else (self._payload, self._encoded)

    def discard(self) -> None:
        """Give the memory back: now, or when the codec thread is through. Idempotent."""
        with self._lock:
            self._discarded.set()
            self._free()

    def _free(self) -> None:
        payload, self._payload = self._payload, None
        if payload is not None:
            self._buffers.give_back(payload)
