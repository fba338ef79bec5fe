"""The sender thread of a pair: takes pushed parts, cuts them into frames, gathers, seals and sends.

One thread per decode peer owns that peer's link, so that a peer that is stuck holds up nobody else. It opens the link
when the first frame needs it, and again, under the next epoch, after the link broke. Parts of transfers that are not
reserved yet wait beside the queue; parts that meet in tokens or layers are merged into one frame.

Order inside `_send_frame` matters: everything that can wait (link, credit, slot) waits BEFORE the gate is entered, so
that ending a transfer waits for at most one gather.
"""

import itertools
import logging
import threading
from collections import deque
from concurrent.futures import Future

from core.errors import ConfigError, ServingError, TransferError
from core.layout import DTYPE_BYTES, KvLayout
from kv_transfer.box import Box, cut
from kv_transfer.codec import RAW, TORCH_DTYPES, FramePlace
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES, FrameHeader, seal
from kv_transfer.link import LinkError, LinkPlan, Links, PairIdentity, SendEnd, Slot
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.outgoing import Commit, OpenedLink, Outgoing, PumpHooks
from kv_transfer.patience import be_patient
from kv_transfer.ports import KvReader
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)
_IDLE_FLUSH_S = 0.05  # an idle pump looks after frames in flight this soon; a busy one meets them when it needs a slot


class SendPump:
    """Thread and queue of one pair. All methods that are not private: any thread, none blocks."""

    def __init__(
        self,
        config: KvTransferConfig,
        pair: PairIdentity,
        layout: KvLayout,
        links: Links,
        reader: KvReader,
        hooks: PumpHooks,
        metrics: KvTransferMetrics,
    ) -> None:
        self._config = config
        self._pair = pair
        self._layout = layout
        self._links = links
        self._reader = reader
        self._codec = RAW  # every transfer is raw until a controller chooses profiles
        self._hooks = hooks
        self._metrics = metrics
        self._dtype = TORCH_DTYPES[layout.dtype]
        self._cell_bytes = 2 * layout.head_dim * DTYPE_BYTES[layout.dtype]
        self._changed = threading.Condition()
        self._queue: deque[tuple[Outgoing, Box | Commit]] = deque()
        self._credit_bytes = 0
        self._window_bytes = 0
        self._opened: OpenedLink | None = None
        self._is_closing = False
        self._link: SendEnd | None = None
        self._spare: Slot | None = None  # acquired, and then not needed
        self._is_in_flight = False  # something was sent, and has not been seen to leave
        self._slot_bytes = 0
        self._link_epoch = 0
        self._distrusted_epoch = 0
        self._epochs = itertools.count(1)
        self.finished: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"kv-send-{pair.receiver_id}", daemon=True)

    # --- from other threads -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def push(self, outgoing: Outgoing, part: Box | Commit) -> None:
        """Queue a part, or let it wait for the reservation."""
        with self._changed:
            if outgoing.held_tokens is None:
                outgoing.waiting.append(part)
                return
            self._queue.append((outgoing, part))
            self._changed.notify()

    def reserve(self, outgoing: Outgoing, held_tokens: int) -> None:
        """Begin to send what is past `held_tokens`."""
        with self._changed:
            outgoing.held_tokens = held_tokens
            self._queue.extend((outgoing, part) for part in outgoing.waiting)
            outgoing.waiting.clear()
            self._changed.notify()

    def grant(self, credit_bytes: int) -> None:
        """Add credit. The first grant of a link is its window, which the balance never exceeds."""
        with self._changed:
            self._window_bytes = self._window_bytes or credit_bytes
            self._credit_bytes = min(self._credit_bytes + credit_bytes, self._window_bytes)
            self._changed.notify()

    def link_opened(self, opened: OpenedLink) -> None:
        """Take the receiver's answer; credit of an older link is void."""
        with self._changed:
            self._opened = opened
            self._credit_bytes = self._window_bytes = 0
            self._changed.notify()

    def distrust(self, link_epoch: int) -> None:
        """The receiver says that this link is lost; do not find it out with the next transfer."""
        with self._changed:
            self._distrusted_epoch = max(self._distrusted_epoch, link_epoch)
            self._changed.notify()

    def wake(self) -> None:
        """Look again: a gate was closed."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread soon; `finished` is set when it is over."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
            link = self._link
        if link is not None:
            link.abort()

    def join(self) -> None:
        """After `finished`: wait for the thread's last instructions."""
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        be_patient()
        while (item := self._next()) is not None:
            outgoing, part = item
            try:
                self._send(outgoing, part)
            except LinkError as error:
                self._drop_link(error.detail, outgoing, part)
            except Exception as error:  # a defect here must not leave transfers waiting for a thread that is gone
                _log.exception("sender thread to %s", self._pair.receiver_id)
                self._drop_link(f"{type(error).__name__}: {error}", outgoing, part)
        if self._link is not None:
            self._link.close()
        self.finished.set_result(None)

    def _next(self) -> tuple[Outgoing, Box | Commit] | None:
        """Return the next part, merged with those that continue it; None when closing."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._is_closing or self._is_distrusted(),
                    _IDLE_FLUSH_S if self._is_in_flight else None,
                )
                if self._is_closing:
                    return None
                if self._queue and not self._is_distrusted():
                    return self._take()
            self._look_after_link()

    def _take(self) -> tuple[Outgoing, Box | Commit]:
        outgoing, part = self._queue.popleft()
        while isinstance(part, Box) and self._queue and self._queue[0][0] is outgoing:
            following = self._queue[0][1]
            merged = part.merge(following) if isinstance(following, Box) else None
            if merged is None or merged.volume * self._cell_bytes > self._slot_bytes - HEADER_BYTES:
                break
            part = merged
            self._queue.popleft()
        return outgoing, part

    def _look_after_link(self) -> None:
        """With nothing to do: see that what was sent has left; a stuck link must not hide behind an idle pump."""
        if self._link is None:
            return
        try:
            if self._is_distrusted():
                raise LinkError("the receiver lost the link")
            self._link.flush(self._config.send_timeout_s)
            self._is_in_flight = False
        except LinkError as error:
            self._drop_link(error.detail)

    def _is_distrusted(self) -> bool:
        return self._link is not None and self._link_epoch <= self._distrusted_epoch

    def _send(self, outgoing: Outgoing, part: Box | Commit) -> None:
        if isinstance(part, Commit):
            if not outgoing.gate.is_closed:
                self._hooks.on_all_sent(outgoing, part.first_token_id)
            return
        assert outgoing.held_tokens is not None
        box = part.from_token(outgoing.held_tokens)
        if box is None or outgoing.gate.is_closed:
            return
        self._ensure_link()
        try:
            pieces = cut(box, self._cell_bytes, self._slot_bytes - HEADER_BYTES, self._layout.block_size)
            for piece in pieces:
                if not self._send_frame(outgoing, piece):
                    return
        except ConfigError as error:
            self._fail(outgoing, NackReason.RECEIVER_FULL, str(error))

    def _send_frame(self, outgoing: Outgoing, box: Box) -> bool:
        """Send one frame. Returns False when the transfer has ended and the rest of the part is void."""
        link = self._ensure_link()
        if outgoing.link_epoch not in (None, self._link_epoch):
            return False  # its earlier frames died with their link; the loop is about to end it
        raw_bytes = box.volume * self._cell_bytes
        bound = self._codec.max_payload_bytes(raw_bytes)
        if not self._take_credit(outgoing, bound):
            return False
        slot = self._spare or link.acquire(self._config.send_timeout_s)
        self._spare = slot
        shape = (len(box.layers), 2, len(box.heads), len(box.tokens), self._layout.head_dim)
        payload = slot.memory[HEADER_BYTES:]
        place = FramePlace(box, outgoing.num_tokens, self._layout.num_layers, self._layout.num_kv_heads)
        if not outgoing.gate.enter():
            self.grant(bound)
            return False
        try:
            out = payload[:raw_bytes].view(self._dtype).view(shape) if self._codec.is_identity else None
            kv = self._reader.read_kv(outgoing.request_id, box.layers, box.tokens, out)
            if kv.shape != shape or kv.dtype != self._dtype:
                raise TransferError(
                    NackReason.POOL, f"the pool gave {tuple(kv.shape)} {kv.dtype}, not {shape} {self._dtype}"
                )
            encoded = self._codec.encode(kv, payload, place)
        except ServingError as error:
            self.grant(bound)
            self._fail(outgoing, NackReason.POOL, str(error))
            return False
        except Exception as error:  # a defect of the pool ends this transfer and is told; the thread serves others
            _log.exception("reading KV of %s", outgoing.transfer_id)
            self.grant(bound)
            self._fail(outgoing, NackReason.POOL, f"{type(error).__name__}: {error}")
            return False
        finally:
            outgoing.gate.leave()
        header = FrameHeader(
            transfer_id=outgoing.transfer_id,
            sender_epoch=self._pair.sender_epoch,
            receiver_epoch=self._pair.receiver_epoch,
            link_epoch=self._link_epoch,
            frame_idx=outgoing.num_frames,
            box=box,
            head_dim=self._layout.head_dim,
            dtype=self._layout.dtype,
            codec_id=self._codec.codec_id,
            codec_params=encoded.params,
            section_bytes=encoded.section_bytes,
            raw_bytes=raw_bytes,
        )
        message_bytes = seal(header, slot.view())
        self._bind(outgoing)
        self._spare = None
        link.send(slot, message_bytes)
        self._is_in_flight = True
        payload_bytes = header.payload_bytes
        if payload_bytes < bound:
            self.grant(bound - payload_bytes)
        outgoing.payload_bytes += payload_bytes
        outgoing.num_frames += 1
        if outgoing.num_frames == 1:
            self._hooks.on_first_frame(outgoing)
        self._metrics.frames.labels("sender").inc()
        self._metrics.payload_bytes.labels("sender").inc(payload_bytes)
        return True

    def _bind(self, outgoing: Outgoing) -> None:
        """Note that frames of a transfer are on this link, unless the receiver has said that it is lost.

        Atomic against `distrust`: whoever is told of the loss afterwards finds the transfer bound.
        """
        with self._changed:
            if self._is_distrusted():
                raise LinkError("the receiver lost the link")
            outgoing.link_epoch = self._link_epoch

    def _take_credit(self, outgoing: Outgoing, num_bytes: int) -> bool:
        """Wait for the receiver to have room. Returns False when the transfer ended meanwhile.

        Raises:
            LinkError: the receiver made no room for as long as a frame may take: it is stuck.
        """
        with self._changed:
            has_changed = self._changed.wait_for(
                lambda: self._credit_bytes >= num_bytes or outgoing.gate.is_closed or self._is_closing,
                self._config.send_timeout_s,
            )
            if not has_changed:
                raise LinkError(f"the receiver granted no credit for {self._config.send_timeout_s:g} s")
            if outgoing.gate.is_closed or self._is_closing:
                return False
            self._credit_bytes -= num_bytes
            return True

    def _ensure_link(self) -> SendEnd:
        if self._link is not None:
            return self._link
        epoch = next(self._epochs)
        self._hooks.on_link_needed(epoch)
        with self._changed:
            self._changed.wait_for(
                lambda: (self._opened is not None and self._opened.link_epoch == epoch) or self._is_closing,
                self._config.open_timeout_s,
            )
            opened = self._opened
        if opened is None or opened.link_epoch != epoch:
            raise LinkError("the receiver did not open its end")
        if opened.backend != self._links.backend:
            raise LinkError(f"the receiver's links are {opened.backend}, ours are {self._links.backend}")
        plan = LinkPlan(
            self._pair.link_name(epoch), opened.slot_bytes, self._config.num_slots, self._config.open_timeout_s
        )
        link = self._links.open_send(opened.address, plan)
        with self._changed:
            self._link = link
            must_abort = self._is_closing
        if must_abort:
            link.abort()
        self._link_epoch = epoch
        self._slot_bytes = opened.slot_bytes
        self._metrics.links.labels("sender").inc()
        return link

    def _drop_link(self, detail: str, outgoing: Outgoing | None = None, part: Box | Commit | None = None) -> None:
        """Break the link and fail what was on it. Transfers that have sent nothing go on over the next link.

        When not even opening worked (there was no link), whoever waits for one fails now: a peer that cannot be
        reached costs one timeout, not one per transfer.
        """
        with self._changed:
            link, self._link = self._link, None
            self._spare = None
            self._is_in_flight = False
            is_closing = self._is_closing
            if (
                link is not None
                and outgoing is not None
                and part is not None
                and not (outgoing.num_frames or outgoing.has_moved)
            ):
                # The link broke before this transfer, while it was idle: no reason to fail.
                outgoing.has_moved, outgoing.link_epoch = True, None
                self._queue.appendleft((outgoing, part))
                outgoing = None
            stranded = {id(waiting): waiting for waiting, _ in self._queue if link is None or waiting.num_frames}
            if outgoing is not None:
                stranded[id(outgoing)] = outgoing
            self._queue = deque(item for item in self._queue if id(item[0]) not in stranded)
        if link is not None:
            link.close()
        if not is_closing:
            for lost in stranded.values():
                self._fail(lost, NackReason.LINK_LOST, detail)
            self._hooks.on_link_lost(detail)

    def _fail(self, outgoing: Outgoing, reason: NackReason, detail: str) -> None:
        outgoing.gate.close(lambda: None)  # nothing of it is read again, whatever is still queued
        self._hooks.on_failed(outgoing, reason, detail)
