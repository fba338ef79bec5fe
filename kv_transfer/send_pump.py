"""The sender thread of a pair: takes pushed parts, cuts them into frames, sends them in order.

One thread per decode peer owns that peer's link, so that a peer that is stuck holds up nobody else. It opens the link
when the first frame needs it, and again, under the next epoch, after the link broke. Parts of transfers that are not
reserved yet wait beside the queue; parts that meet in tokens or layers are merged into one frame.

A raw frame is gathered right into its slot, here. Coded frames are made ahead by codec threads (`send_line`) while
earlier ones are on the wire; this thread copies them into a slot when their turn has come.

Order matters: everything that can wait (link, credit, slot, rate) waits OUTSIDE the gate, so that ending a transfer
waits for at most one gather.
"""

import itertools
import logging
import threading
from collections import deque
from concurrent.futures import Future

from torch import Tensor

from core.clock import Clock
from core.errors import ConfigError
from core.layout import KvLayout
from kv_transfer.box import Box, cut
from kv_transfer.codec import Encoded
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.config import KvTransferConfig
from kv_transfer.encoding import EncodeFailed, FrameEncoder, largest_raw_bytes
from kv_transfer.frame import HEADER_BYTES, FrameHeader, seal, section_spans
from kv_transfer.link import LinkError, LinkPlan, Links, PairIdentity, SendEnd, Slot
from kv_transfer.link_gauge import LinkGauge
from kv_transfer.link_quota import LinkQuota, QuotaExceeded
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.outgoing import Commit, OpenedLink, Outgoing, PumpHooks
from kv_transfer.patience import be_patient
from kv_transfer.ports import KvReader
from kv_transfer.rate_cap import RateCap
from kv_transfer.send_line import LineItem, SendLine
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)
# An idle pump looks after frames in flight this late (a busy one meets them when it needs a slot): while it flushes it
# takes no new part, so it must be sure that none is about to come.
_IDLE_FLUSH_S = 0.5


class SendPump:
    """Thread and queue of one pair. All methods that are not private: any thread, none blocks."""

    def __init__(
        self,
        config: KvTransferConfig,
        pair: PairIdentity,
        layout: KvLayout,
        links: Links,
        reader: KvReader,
        threads: CodecThreads,
        buffers: Buffers,
        quota: LinkQuota,
        hooks: PumpHooks,
        metrics: KvTransferMetrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self._pair = pair
        self._layout = layout
        self._links = links
        self._quota = quota
        self._hooks = hooks
        self._metrics = metrics
        self._clock = clock
        self.gauge = LinkGauge(clock)
        self._encoder = FrameEncoder(layout, reader)
        self._line = SendLine(self._encoder, threads, buffers, self.wake, max_raw_bytes=config.lookahead_bytes)
        rate = config.rate_limit_bytes_per_s
        self._rate_cap = None if rate is None else RateCap(rate)
        self._changed = threading.Condition()
        self._queue: deque[tuple[Outgoing, Box | Commit]] = deque()
        self._credit_bytes = 0
        self._window_bytes = 0
        self._opened: OpenedLink | None = None
        self._is_closing = False
        self._is_giving_up_link = False
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

    def give_up_link(self) -> None:
        """Another peer needs the place: close the link, if nothing is to be sent on it."""
        with self._changed:
            self._is_giving_up_link = True
            self._changed.notify()

    def wake(self) -> None:
        """Look again: a gate was closed, or a frame was encoded."""
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
        while True:
            item: LineItem | None = None
            try:
                item = self._next()
                if item is None:
                    break
                self._send(item)
                item.discard()
            except LinkError as error:
                self._drop_link(error, item)
            except Exception as error:  # a defect here must not leave transfers waiting for a thread that is gone
                _log.exception("sender thread to %s", self._pair.receiver_id)
                self._drop_link(LinkError(f"{type(error).__name__}: {error}"), item)
        self._line.clear()
        if self._link is not None:
            self._link.close()
        self._quota.closed(self._pair.receiver_id, self)
        self.finished.set_result(None)

    def _next(self) -> LineItem | None:
        """Return what is to be sent next, when it is ready; None when closing.

        Raises:
            LinkError: the link cannot be opened, or has broken.
        """
        while True:
            awaited = self._line.head
            with self._changed:
                has_work = self._changed.wait_for(self._has_work, self._patience_s(awaited))
                if self._is_closing:
                    return None
                if self._is_distrusted():
                    raise LinkError("the receiver lost the link")
                taken = self._take() if self._may_take() else None
            self._line.drop_ended()
            if taken is not None:
                self._stage(*taken)
            elif self._is_giving_up_link:
                self._give_up_link()
            elif not has_work and awaited is not None:
                detail = f"a frame was not encoded within {self._config.send_timeout_s:g} s"
                self._fail(awaited.outgoing, NackReason.CODEC, detail)
            elif not has_work:
                self._look_after_link()
            self._line.begin()
            head = self._line.head
            if head is not None and head.is_ready and not self._may_take():  # the look-ahead is filled first
                return self._line.pop()

    def _patience_s(self, awaited: LineItem | None) -> float | None:
        if awaited is not None:
            return self._config.send_timeout_s  # for its encoder
        return _IDLE_FLUSH_S if self._is_in_flight else None

    def _has_work(self) -> bool:
        head = self._line.head
        if head is not None and (head.is_ready or head.outgoing.gate.is_closed):
            return True
        return self._may_take() or self._is_closing or self._is_distrusted() or self._is_giving_up_link

    def _may_take(self) -> bool:
        """Tell whether the next part may join the line: raw ones only when it is empty, they cannot be made ahead."""
        if not self._queue:
            return False
        if not self._line:
            return True
        outgoing, part = self._queue[0]
        is_raw = isinstance(part, Box) and outgoing.encoder.is_identity
        return not is_raw and self._line.has_room

    def _take(self) -> tuple[Outgoing, Box | Commit]:
        """Return the next part, merged with those that continue it."""
        outgoing, part = self._queue.popleft()
        limit = self._frame_raw_bytes(outgoing)
        while isinstance(part, Box) and self._queue and self._queue[0][0] is outgoing:
            following = self._queue[0][1]
            merged = part.merge(following) if isinstance(following, Box) else None
            if merged is None or merged.volume * self._encoder.cell_bytes > limit:
                break
            part = merged
            self._queue.popleft()
        return outgoing, part

    def _stage(self, outgoing: Outgoing, part: Box | Commit) -> None:
        """Put a part into the line: coded ones as frames, raw ones whole."""
        assert outgoing.held_tokens is not None
        what = part if isinstance(part, Commit) else part.from_token(outgoing.held_tokens)
        if what is None or outgoing.gate.is_closed:
            return
        if isinstance(what, Commit) or outgoing.encoder.is_identity:
            self._line.append(outgoing, [what])
            return
        try:
            self._ensure_link()  # how large a frame may be is known then
        except LinkError:
            self._line.append(outgoing, [what])  # whoever waits for the link is told
            raise
        self._line.append(outgoing, self._cut(outgoing, what))

    def _cut(self, outgoing: Outgoing, box: Box) -> list[Box]:
        try:
            limit = self._frame_raw_bytes(outgoing)
            return list(cut(box, self._encoder.cell_bytes, limit, self._layout.block_size))
        except ConfigError as error:
            self._fail(outgoing, NackReason.RECEIVER_FULL, str(error))
            return []

    def _frame_raw_bytes(self, outgoing: Outgoing) -> int:
        """Return how much KV one frame of a transfer may hold; 0 while no link is open."""
        room = self._slot_bytes - HEADER_BYTES
        if outgoing.encoder.is_identity or room <= 0:
            return max(0, room)
        return min(outgoing.frame_raw_bytes, largest_raw_bytes(outgoing.encoder, room, outgoing.frame_raw_bytes))

    def _look_after_link(self) -> None:
        """With nothing to do: see that what was sent has left; a stuck link must not hide behind an idle pump."""
        if self._link is not None:
            self._link.flush(self._config.send_timeout_s)
        self._is_in_flight = False

    def _give_up_link(self) -> None:
        with self._changed:
            self._is_giving_up_link = False
            if self._queue or self._line or self._link is None:
                return
            link, self._link = self._link, None
            self._spare = None
        try:
            link.flush(self._config.send_timeout_s)
        finally:
            self._is_in_flight = False
            link.close()
            self._quota.closed(self._pair.receiver_id, self)

    def _is_distrusted(self) -> bool:
        return self._link is not None and self._link_epoch <= self._distrusted_epoch

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send(self, item: LineItem) -> None:
        outgoing, what = item.outgoing, item.what
        if outgoing.gate.is_closed:
            return
        if isinstance(what, Commit):
            self._hooks.on_all_sent(outgoing, what.first_token_id)
            return
        self._ensure_link()
        if item.job is None:
            pieces = self._cut(outgoing, what)
            for left, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
                if not self._send_raw(outgoing, piece, is_last=left == 0):
                    return
            return
        try:
            made = item.job.result()
        except EncodeFailed as failed:
            self._fail(outgoing, failed.nack_reason, failed.detail)
            return
        if made is not None:
            self._send_coded(outgoing, what, *made)

    def _send_raw(self, outgoing: Outgoing, box: Box, *, is_last: bool) -> bool:
        """Gather a box into a slot and send it. Returns False when the transfer has ended: the rest is void."""
        raw_bytes = box.volume * self._encoder.cell_bytes
        slot = self._room_for(outgoing, raw_bytes)
        if slot is None:
            return False
        try:
            encoded = self._encoder.encode(outgoing, box, slot.memory[HEADER_BYTES:])
        except EncodeFailed as failed:
            self.grant(raw_bytes)
            self._fail(outgoing, failed.nack_reason, failed.detail)
            return False
        if encoded is None:
            self.grant(raw_bytes)
            return False
        return self._transmit(outgoing, box, slot, encoded, is_last=is_last)

    def _send_coded(self, outgoing: Outgoing, box: Box, payload: Tensor, encoded: Encoded) -> None:
        num_bytes = section_spans(encoded.section_bytes)[-1].stop if encoded.section_bytes else 0
        if num_bytes > self._slot_bytes - HEADER_BYTES:
            self._fail(outgoing, NackReason.CODEC, f"an encoder's {num_bytes} bytes do not fit into a slot")
            return
        slot = self._room_for(outgoing, num_bytes)
        if slot is not None:
            slot.memory[HEADER_BYTES : HEADER_BYTES + num_bytes].copy_(payload[:num_bytes])
            self._transmit(outgoing, box, slot, encoded, is_last=True)

    def _room_for(self, outgoing: Outgoing, num_bytes: int) -> Slot | None:
        """Wait for credit and for a slot. Returns None when the transfer has ended.

        Raises:
            LinkError: neither came in time.
        """
        link = self._ensure_link()
        if outgoing.link_epoch not in (None, self._link_epoch):
            return None  # its earlier frames died with their link; the loop is about to end it
        if not self._take_credit(outgoing, num_bytes):
            return None
        self._spare = self._spare or link.acquire(self._config.send_timeout_s)
        return self._spare

    def _transmit(self, outgoing: Outgoing, box: Box, slot: Slot, encoded: Encoded, *, is_last: bool) -> bool:
        """Seal what is in the slot and send it. Returns False when the transfer ended meanwhile."""
        header = FrameHeader(
            transfer_id=outgoing.transfer_id,
            sender_epoch=self._pair.sender_epoch,
            receiver_epoch=self._pair.receiver_epoch,
            link_epoch=self._link_epoch,
            frame_idx=outgoing.num_frames,
            box=box,
            head_dim=self._layout.head_dim,
            dtype=self._layout.dtype,
            codec_id=outgoing.encoder.codec_id,
            codec_params=encoded.params,
            section_bytes=encoded.section_bytes,
            raw_bytes=box.volume * self._encoder.cell_bytes,
        )
        message_bytes = seal(header, slot.view())
        payload_bytes = header.payload_bytes
        if not self._wait_for_rate(outgoing, message_bytes):
            self.grant(payload_bytes)
            return False
        link = self._bind(outgoing)
        self._spare = None
        head = self._line.head
        is_backlogged = not is_last or bool(self._queue) or (head is not None and head.is_ready)
        self.gauge.sent(payload_bytes, is_backlogged=is_backlogged)
        link.send(slot, message_bytes)
        self._is_in_flight = True
        outgoing.payload_bytes += payload_bytes
        outgoing.num_frames += 1
        if outgoing.num_frames == 1:
            self._hooks.on_first_frame(outgoing)
        self._metrics.frames_sent.inc()
        self._metrics.payload_sent.inc(payload_bytes)
        return True

    def _bind(self, outgoing: Outgoing) -> SendEnd:
        """Note that frames of a transfer are on this link, unless the receiver has said that it is lost.

        Atomic against `distrust`: whoever is told of the loss afterwards finds the transfer bound.
        """
        with self._changed:
            if self._link is None or self._is_distrusted():
                raise LinkError("the receiver lost the link")
            outgoing.link_epoch = self._link_epoch
            return self._link

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

    def _wait_for_rate(self, outgoing: Outgoing, num_bytes: int) -> bool:
        """Wait until the rate cap lets a message pass. Returns False when the transfer ended meanwhile."""
        if self._rate_cap is None:
            return True
        delay_s = self._rate_cap.delay_s(self._clock.now(), num_bytes)
        with self._changed:
            return not self._changed.wait_for(lambda: outgoing.gate.is_closed or self._is_closing, delay_s)

    # --- the link -----------------------------------------------------------------------------------------------------

    def _ensure_link(self) -> SendEnd:
        if self._link is not None:
            return self._link
        self._quota.open(self._pair.receiver_id, self, self._config.open_timeout_s)
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
            self._pair.link_name(epoch),
            opened.slot_bytes,
            self._config.num_slots,
            self._config.open_timeout_s,
            self._config.send_timeout_s,
        )
        link = self._links.open_send(opened.address, plan)
        self.gauge.opened(epoch, link.carrier)
        with self._changed:
            self._link = link
            must_abort = self._is_closing
        if must_abort:
            link.abort()
        self._link_epoch = epoch
        self._slot_bytes = opened.slot_bytes
        self._metrics.links.labels("sender").inc()
        return link

    def _drop_link(self, error: LinkError, item: LineItem | None) -> None:
        """Break the link and fail what was on it. Transfers that have sent nothing go on over the next link.

        When not even opening worked (there was no link), whoever waits for one fails now: a peer that cannot be
        reached costs one timeout, not one per transfer.
        """
        stranded: dict[int, Outgoing] = {}
        with self._changed:
            link, self._link = self._link, None
            self._spare = None
            self._is_in_flight = False
            is_closing = self._is_closing
            if item is not None:
                outgoing = item.outgoing
                if link is not None and not (outgoing.num_frames or outgoing.has_moved):
                    # The link broke before this transfer, while it was idle: no reason to fail.
                    outgoing.has_moved, outgoing.link_epoch = True, None
                    self._line.put_back(item)
                else:
                    item.discard()
                    stranded[id(outgoing)] = outgoing
            for waiting in [outgoing for outgoing, _ in self._queue] + self._line.transfers():
                if link is None or waiting.num_frames:
                    stranded[id(waiting)] = waiting
            self._queue = deque(queued for queued in self._queue if id(queued[0]) not in stranded)
        self._line.drop(stranded)
        if link is not None:
            link.close()
        self._quota.closed(self._pair.receiver_id, self)
        if not is_closing:
            reason = error.nack_reason if isinstance(error, QuotaExceeded) else NackReason.LINK_LOST
            for lost in stranded.values():
                self._fail(lost, reason, error.detail)
            self._hooks.on_link_lost(error.detail, was_open=link is not None)

    def _fail(self, outgoing: Outgoing, reason: NackReason, detail: str) -> None:
        outgoing.gate.close(lambda: None)  # nothing of it is read again, whatever is still queued
        self._hooks.on_failed(outgoing, reason, detail)
