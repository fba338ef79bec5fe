"""The receiver thread of a link: takes messages as they arrive, lands them, gives the slot and the credit back.

One thread per open link; a rebuilt link has a new thread, so nothing that an old one still does can touch the new
epoch's frames. A frame that is refused ends its transfer; bytes that are not a frame at all end the link, since nothing
that follows them can be trusted either.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Protocol

from core.ids import TransferId
from kv_transfer.frame import FrameRefused
from kv_transfer.landing import Landing, LandingZone
from kv_transfer.link import LinkError, LinkPlan, Links, ReceiveEnd
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.patience import be_patient
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)


class ReceiveHooks(Protocol):
    """Told on the pump's thread; must not block."""

    def on_progress(self) -> None:
        """Look at the landings and at `take_credit`: a transfer began or is covered, or a portion of credit is due.

        Not called for every frame: waking an event loop costs as much as landing a small one.
        """
        ...

    def on_refused(self, transfer_id: TransferId, reason: NackReason, detail: str) -> None: ...

    def on_link_lost(self, link_epoch: int, detail: str) -> None: ...


class ReceivePump:
    """Thread of one link epoch. All methods that are not private: any thread, none blocks."""

    def __init__(
        self,
        links: Links,
        plan: LinkPlan,
        link_epoch: int,
        zone: LandingZone,
        hooks: ReceiveHooks,
        metrics: KvTransferMetrics,
        *,
        credit_portion_bytes: int,
    ) -> None:
        """`credit_portion_bytes`: consumed bytes that are worth a message to the sender."""
        self._links = links
        self._plan = plan
        self._link_epoch = link_epoch
        self._zone = zone
        self._hooks = hooks
        self._metrics = metrics
        self._lock = threading.Lock()
        self._link: ReceiveEnd | None = None
        self._is_closing = False
        self._credit_portion_bytes = credit_portion_bytes
        self._consumed_bytes = 0
        self.finished: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"kv-receive-{plan.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take_credit(self) -> int:
        """Return the payload bytes consumed since credit was last taken, 0 while they are less than a portion."""
        with self._lock:
            if self._consumed_bytes < self._credit_portion_bytes:
                return 0
            taken, self._consumed_bytes = self._consumed_bytes, 0
            return taken

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

    def _run(self) -> None:
        detail = ""
        be_patient()
        try:
            with self._open() as link:
                self._receive(link)
        except LinkError as error:
            detail = error.detail
        except Exception as error:  # a defect here must not leave transfers waiting for a thread that is gone
            _log.exception("receiver thread of %s", self._plan.name)
            detail = f"{type(error).__name__}: {error}"
        # The link is closed before anybody is told: the peer is released only when the group is freed.
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
        frames, payload = self._metrics.frames.labels("receiver"), self._metrics.payload_bytes.labels("receiver")
        while True:
            slot = link.receive()
            landing: Landing | None = None
            try:
                header, landing = self._zone.land(slot)
                payload_bytes = header.payload_bytes
            except FrameRefused as refused:
                self._metrics.frames_refused.labels(refused.reason).inc()
                if refused.transfer_id is None:
                    raise LinkError(f"what arrived is not a frame: {refused.detail}") from refused
                self._hooks.on_refused(refused.transfer_id, refused.reason, refused.detail)
                payload_bytes = self._plan.slot_bytes  # what it really was is not known; the sender clamps
            else:
                if landing is None:
                    self._metrics.frames_late.inc()
                else:
                    frames.inc()
                    payload.inc(payload_bytes)
            link.release(slot)
            with self._lock:
                self._consumed_bytes += payload_bytes
                is_due = self._consumed_bytes >= self._credit_portion_bytes
            if is_due or (landing is not None and (landing.written.num_frames == 1 or landing.written.is_covered)):
                self._hooks.on_progress()
