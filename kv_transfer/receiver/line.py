"""Coded frames between their slot and the pool: copied out at once, decoded and written by codec threads.

One line per link. What is in it is bounded in frames and in bytes of KV; when it is full the receiver thread waits, the
slots fill up behind it, and in the end the sender waits for credit: no queue grows anywhere.
"""

import logging
import threading
from typing import Protocol

from torch import Tensor

from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.frame import HEADER_BYTES, FrameRefused
from kv_transfer.link import LinkError, Slot
from kv_transfer.receiver.events import FramesWritten
from kv_transfer.receiver.landing import Arrival, LandingZone
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)
_FRAMES_PER_THREAD = 2  # one is decoded while the next is copied


class DecodedHooks(Protocol):
    """Told on a codec thread, one of the two per frame taken; must not block."""

    def on_decoded(self, arrival: Arrival, written: FramesWritten | None) -> None:
        """`written` is None when the transfer had ended."""
        ...

    def on_not_decoded(self, arrival: Arrival, refused: FrameRefused) -> None: ...


class DecodeLine:
    """The coded frames of one link. `take` and `drain` for the receiver thread."""

    def __init__(
        self,
        zone: LandingZone,
        threads: CodecThreads,
        buffers: Buffers,
        hooks: DecodedHooks,
        *,
        max_raw_bytes: int,
        patience_s: float,
    ) -> None:
        """
        Args:
            max_raw_bytes: KV in the line; one frame is always taken.
            patience_s: how long to wait for room before the codec is taken to be stuck.
        """
        self._zone = zone
        self._threads = threads
        self._buffers = buffers
        self._hooks = hooks
        self._max_frames = _FRAMES_PER_THREAD * threads.num_threads
        self._max_raw_bytes = max_raw_bytes
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._num_frames = 0
        self._raw_bytes = 0

    def take(self, arrival: Arrival, slot: Slot) -> None:
        """Copy the payload out of its slot, which is free afterwards, and have it decoded.

        Raises:
            LinkError: no frame was decoded for too long.
        """
        header = arrival.header
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_room(header.raw_bytes), self._patience_s):
                raise LinkError(f"no frame was decoded for {self._patience_s:g} s")
            self._num_frames += 1
            self._raw_bytes += header.raw_bytes
        payload_bytes = header.payload_bytes
        payload = self._buffers.lend(payload_bytes)
        payload[:payload_bytes].copy_(slot.memory[HEADER_BYTES : HEADER_BYTES + payload_bytes])
        try:
            self._threads.submit(lambda: self._decode(arrival, payload))
        except RuntimeError:  # closed; the link ends with this
            self._leave(arrival, payload)
            raise

    def drain(self, timeout_s: float) -> bool:
        """Wait until every frame taken was written or refused."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_frames == 0, timeout_s)

    def _has_room(self, raw_bytes: int) -> bool:
        if self._num_frames == 0:
            return True
        return self._num_frames < self._max_frames and self._raw_bytes + raw_bytes <= self._max_raw_bytes

    def _decode(self, arrival: Arrival, payload: Tensor) -> None:
        try:
            written = self._zone.write(arrival, payload)
        except FrameRefused as refused:
            self._hooks.on_not_decoded(arrival, refused)
        except Exception as error:  # a defect of ours: the transfer must hear of it, or it would wait for its lease
            _log.exception("landing a coded frame of %s", arrival.landing.transfer_id)
            detail = f"{type(error).__name__}: {error}"
            self._hooks.on_not_decoded(arrival, FrameRefused(NackReason.CODEC, detail, arrival.landing.transfer_id))
        else:
            self._hooks.on_decoded(arrival, written)
        finally:
            self._leave(arrival, payload)

    def _leave(self, arrival: Arrival, payload: Tensor) -> None:
        self._buffers.give_back(payload)
        with self._changed:
            self._num_frames -= 1
            self._raw_bytes -= arrival.header.raw_bytes
            self._changed.notify_all()
