"""The receiver thread of a link: takes messages as they arrive, lands them, gives the slot and the credit back.

One thread per open link; a rebuilt link has a new thread, so nothing that an old one still does can touch the new
epoch's frames. A raw frame is written from its slot; a coded one is copied out and written by codec threads
(`line`). A frame that is refused ends its transfer; bytes that are not a frame at all end the link, since
nothing that follows them can be trusted either.

Two counts go back to the sender. Credit: payload that is in the pool, so that more may come. Received: payload that
has crossed the link, decoded or not, from which the sender learns how fast the link is.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from core.ids import TransferId
from kv_transfer.frame import HEADER_BYTES, FrameRefused
from kv_transfer.link import LinkError, LinkPlan, ReceiveEnd, Slot
from kv_transfer.receiver.events import FramesWritten
from kv_transfer.receiver.landing import Arrival, LandingZone
from kv_transfer.receiver.line import DecodeLine
from kv_transfer.receiver.parts import ReceiverParts
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)
# A slow link would be blind while a whole portion of credit crosses it: so much later, so much is told.
_NEWS_S = 0.02
_NEWS_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Received:
    """Payload that arrived on a link, and how long ago the last of it did."""

    num_bytes: int
    ago_s: float


class ReceiveHooks(Protocol):
    """Told on the pump's thread or on a codec thread; must not block."""

    def on_progress(self) -> None:
        """Look at the landings and at `take_news`: a transfer began or is covered, or a portion of credit is due.

        Not called for every frame: waking an event loop costs as much as landing a small one.
        """
        ...

    def on_refused(self, transfer_id: TransferId, reason: NackReason, detail: str) -> None: ...

    def on_link_lost(self, link_epoch: int, detail: str) -> None: ...


class ReceivePump:
    """Thread of one link epoch. All methods that are not private: any thread, none blocks."""

    def __init__(
        self, parts: ReceiverParts, plan: LinkPlan, link_epoch: int, zone: LandingZone, hooks: ReceiveHooks
    ) -> None:
        config = parts.config
        self._links = parts.links
        self._plan = plan
        self._link_epoch = link_epoch
        self._zone = zone
        self._hooks = hooks
        self._metrics = parts.metrics
        self._clock = parts.clock
        self._close_timeout_s = config.close_timeout_s
        self._line = DecodeLine(
            zone,
            parts.threads,
            parts.buffers,
            self,
            max_raw_bytes=config.lookahead_bytes,
            patience_s=config.codec_timeout_s,
        )
        # Credit goes back in portions: large enough to be few messages, small enough that a sender which waits for one
        # more slot always gets it.
        self._portion_bytes = max(1, min(config.credit_bytes // 4, config.credit_bytes - config.slot_bytes))
        self._lock = threading.Lock()
        self._link: ReceiveEnd | None = None
        self._is_closing = False
        self._consumed_bytes = 0
        self._received_bytes = self._told_bytes = 0
        self._told_at = self._received_at = parts.clock.now()
        self.finished: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"kv-receive-{plan.name}", daemon=True)

    @property
    def received(self) -> Received:
        """What arrived on this link."""
        with self._lock:
            return Received(self._received_bytes, self._clock.now() - self._received_at)

    def start(self) -> None:
        self._thread.start()

    def take_news(self) -> tuple[int, Received] | None:
        """Return (payload bytes consumed since the last news, what was received at all), None when it is early."""
        with self._lock:
            if not self._is_news_due():
                return None
            consumed, self._consumed_bytes = self._consumed_bytes, 0
            self._told_bytes = self._received_bytes
            self._told_at = self._clock.now()
            return consumed, Received(self._received_bytes, self._told_at - self._received_at)

    def close(self) -> None:
        """Break the link and end the thread; `finished` is set when it is over."""
        with self._lock:
            self._is_closing = True
            link = self._link
        if link is not None:
            link.abort()

    def join(self) -> None:
        """After `finished`: wait for the thread's last instructions."""
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        detail = ""
        try:
            with self._open() as link:
                self._receive(link)
        except LinkError as error:
            detail = error.detail
        except Exception as error:  # a defect here must not leave transfers waiting for a thread that is gone
            _log.exception("receiver thread of %s", self._plan.name)
            detail = f"{type(error).__name__}: {error}"
        # The link is closed before anybody is told: the peer is released only when the group is freed. And what had
        # arrived is written before that: it may complete a transfer.
        if not self._line.drain(self._close_timeout_s):
            _log.warning("%s: frames are being decoded still", self._plan.name)
        self._hooks.on_link_lost(self._link_epoch, detail)
        self.finished.set_result(None)

    @contextlib.contextmanager
    def _open(self) -> Iterator[ReceiveEnd]:
        link = self._links.open_receive(self._plan)
        try:
            with self._lock:
                self._link = link
                must_abort = self._is_closing
            if must_abort:
                link.abort()
            self._metrics.links.labels("receiver").inc()
            yield link
        finally:
            with self._lock:
                self._link = None
            link.close()

    def _receive(self, link: ReceiveEnd) -> None:
        while True:
            slot = link.receive()
            self._land(slot)
            link.release(slot)

    def _land(self, slot: Slot) -> None:
        try:
            header, arrival = self._zone.admit(slot)
        except FrameRefused as refused:
            if refused.transfer_id is None:
                self._metrics.frames_refused.labels(refused.reason).inc()
                raise LinkError(f"what arrived is not a frame: {refused.detail}") from refused
            self._refuse(refused)
            self._count(self._plan.slot_bytes)  # what it really was is not known; the sender clamps
            self._consume(self._plan.slot_bytes)
            return
        self._count(header.payload_bytes)
        if arrival is None:
            self._metrics.frames_late.inc()
            self._consume(header.payload_bytes)
        elif not arrival.is_raw:
            self._line.take(arrival, slot)
        else:
            try:
                written = self._zone.write(arrival, slot.memory[HEADER_BYTES:])
            except FrameRefused as refused:
                self.on_not_decoded(arrival, refused)
            else:
                self.on_decoded(arrival, written)

    # --- what came of an admitted frame; any thread -------------------------------------------------------------------

    def on_decoded(self, arrival: Arrival, written: FramesWritten | None) -> None:
        payload_bytes = arrival.header.payload_bytes
        if written is None:
            self._metrics.frames_late.inc()
        else:
            self._metrics.frames_received.inc()
            self._metrics.payload_received.inc(payload_bytes)
        # Codec threads may account in one order and come here in another: whoever adds the last frame sees it covered.
        is_telling = written is not None and (written.num_frames == 1 or written.is_covered)
        self._consume(payload_bytes, is_telling=is_telling)

    def on_not_decoded(self, arrival: Arrival, refused: FrameRefused) -> None:
        self._refuse(refused)
        # What the frame says of its length may be what it is refused for: credit must not leak away by that.
        self._consume(self._plan.slot_bytes)

    def _refuse(self, refused: FrameRefused) -> None:
        assert refused.transfer_id is not None
        self._metrics.frames_refused.labels(refused.reason).inc()
        self._hooks.on_refused(refused.transfer_id, refused.reason, refused.detail)

    def _count(self, payload_bytes: int) -> None:
        with self._lock:
            self._received_bytes += payload_bytes
            self._received_at = self._clock.now()

    def _consume(self, payload_bytes: int, *, is_telling: bool = False) -> None:
        with self._lock:
            self._consumed_bytes += payload_bytes
            is_due = self._is_news_due()
        if is_due or is_telling:
            self._hooks.on_progress()

    def _is_news_due(self) -> bool:
        if self._consumed_bytes >= self._portion_bytes:
            return True
        has_enough = self._received_bytes - self._told_bytes >= _NEWS_BYTES
        return has_enough and self._clock.now() - self._told_at >= _NEWS_S
