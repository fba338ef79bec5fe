"""The sender thread of a pair: takes pushed parts, cuts them into frames, sends them in order.

One thread per decode peer owns that peer's link, so that a peer that is stuck holds up nobody else. It opens the link
when the first frame needs it, and again, under the next epoch, after the link broke. Parts of transfers that are not
reserved yet wait beside the queue; parts that meet in tokens or layers are merged into one frame.

A raw frame is gathered right into its slot, here. Coded frames are made ahead by codec threads (`line`) while
earlier ones are on the wire; this thread copies them into a slot when their turn has come.

Order matters: everything that can wait (link, credit, slot, rate) waits OUTSIDE the gate, so that ending a transfer
waits for at most one gather.
"""

import logging
import threading
from collections import deque
from concurrent.futures import Future

from torch import Tensor

from core.errors import ConfigError
from kv_transfer.box import Box, cut
from kv_transfer.codec import Encoded
from kv_transfer.frame import HEADER_BYTES, FrameHeader, seal, section_spans
from kv_transfer.link import LinkError, PairIdentity, Slot
from kv_transfer.sender.encoding import EncodeFailed, FrameEncoder, largest_raw_bytes
from kv_transfer.sender.line import LineItem, SendLine
from kv_transfer.sender.link import SendLink, Unreachable
from kv_transfer.sender.link_quota import QuotaExceeded
from kv_transfer.sender.outgoing import Commit, Outgoing, PumpHooks
from kv_transfer.sender.parts import SenderParts
from kv_transfer.session import NackReason

_log = logging.getLogger(__name__)
# An idle pump looks after frames in flight this late (a busy one meets them when it needs a slot): while it flushes it
# takes no new part, so it must be sure that none is about to come.
_IDLE_FLUSH_S = 0.5


class SendPump:
    """Thread and queue of one pair. All methods that are not private: any thread, none blocks."""

    def __init__(self, parts: SenderParts, pair: PairIdentity, hooks: PumpHooks) -> None:
        self._config = parts.config
        self._pair = pair
        self._layout = parts.layout
        self._hooks = hooks
        self._metrics = parts.metrics
        self._encoder = FrameEncoder(parts.layout, parts.reader, parts.tokens)
        max_raw_bytes = parts.config.lookahead_bytes
        self._line = SendLine(self._encoder, parts.threads, parts.buffers, self.wake, max_raw_bytes=max_raw_bytes)
        self._changed = threading.Condition()
        self.link = SendLink(parts, pair, self, hooks, self._changed)
        self._queue: deque[tuple[Outgoing, Box | Commit]] = deque()
        self._is_giving_up_link = False
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
        self.link.close()

    def join(self) -> None:
        """After `finished`: wait for the thread's last instructions."""
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
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
        self.link.drop()
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
                if self.link.is_closing:
                    return None
                if self.link.is_distrusted:
                    raise LinkError("the receiver lost the link")
                taken = self._take() if self._may_take() else None
            self._line.drop_ended()
            if taken is not None:
                self._stage(*taken)
            elif self._is_giving_up_link:
                self._give_up_link()
            elif not has_work and awaited is not None:
                detail = f"a frame was not encoded within {self._config.codec_timeout_s:g} s"
                self._fail(awaited.outgoing, NackReason.CODEC, detail)
            elif not has_work:
                self._look_after_link()
            self._line.begin()
            head = self._line.head
            if head is not None and head.is_ready and not self._may_take():  # the look-ahead is filled first
                return self._line.pop()

    def _patience_s(self, awaited: LineItem | None) -> float | None:
        if awaited is not None:
            return self._config.codec_timeout_s
        return _IDLE_FLUSH_S if self.link.is_in_flight else None

    def _has_work(self) -> bool:
        head = self._line.head
        if head is not None and (head.is_ready or head.outgoing.gate.is_closed):
            return True
        return self._may_take() or self.link.is_closing or self.link.is_distrusted or self._is_giving_up_link

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
        if outgoing.selection is not None and isinstance(what, Box):
            return  # which of its tokens are sent is known when all are computed
        if outgoing.selection is not None and outgoing.first_token < outgoing.num_tokens:
            box = self._select(outgoing)
            if box is not None:
                self._stage_box(outgoing, box)
        if isinstance(what, Commit):
            self._line.append(outgoing, [what])
        else:
            self._stage_box(outgoing, what)

    def _select(self, outgoing: Outgoing) -> Box | None:
        try:
            return self._encoder.select(outgoing)
        except EncodeFailed as failed:
            self._fail(outgoing, failed.nack_reason, failed.detail)
            return None

    def _stage_box(self, outgoing: Outgoing, what: Box) -> None:
        if outgoing.encoder.is_identity:
            self._line.append(outgoing, [what])
            return
        try:
            self.link.ensure()  # how large a frame may be is known then
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
        room = self.link.payload_room
        if outgoing.encoder.is_identity or room == 0:
            return room
        return min(outgoing.frame_raw_bytes, largest_raw_bytes(outgoing.encoder, room, outgoing.frame_raw_bytes))

    def _look_after_link(self) -> None:
        """With nothing to do: a stuck link must not hide behind an idle pump."""
        self.link.flush()

    def _give_up_link(self) -> None:
        with self._changed:
            self._is_giving_up_link = False
            is_needed = bool(self._queue)
        if not is_needed and not self._line:
            self.link.give_up()

    def _is_next_ready(self) -> bool:
        """Tell whether another frame could be sent right away: what has yet to be encoded could not."""
        with self._changed:
            head, queued = self._line.head, self._queue[0] if self._queue else None
        if head is not None:
            return head.is_ready and isinstance(head.what, Box)
        return queued is not None and isinstance(queued[1], Box) and queued[0].encoder.is_identity

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send(self, item: LineItem) -> None:
        outgoing, what = item.outgoing, item.what
        if outgoing.gate.is_closed:
            return
        if isinstance(what, Commit):
            self._hooks.on_all_sent(outgoing, what.first_token_id)
            return
        self.link.ensure()
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
        slot = self.link.room_for(outgoing, raw_bytes)
        if slot is None:
            return False
        try:
            encoded = self._encoder.encode(outgoing, box, slot.memory[HEADER_BYTES:])
        except EncodeFailed as failed:
            self.link.grant(raw_bytes)
            self._fail(outgoing, failed.nack_reason, failed.detail)
            return False
        if encoded is None:
            self.link.grant(raw_bytes)
            return False
        return self._transmit(outgoing, box, slot, encoded, is_last=is_last)

    def _send_coded(self, outgoing: Outgoing, box: Box, payload: Tensor, encoded: Encoded) -> None:
        num_bytes = section_spans(encoded.section_bytes)[-1].stop if encoded.section_bytes else 0
        if num_bytes > self.link.payload_room:
            self._fail(outgoing, NackReason.CODEC, f"an encoder's {num_bytes} bytes do not fit into a slot")
            return
        slot = self.link.room_for(outgoing, num_bytes)
        if slot is not None:
            slot.memory[HEADER_BYTES : HEADER_BYTES + num_bytes].copy_(payload[:num_bytes])
            self._transmit(outgoing, box, slot, encoded, is_last=True)

    def _transmit(self, outgoing: Outgoing, box: Box, slot: Slot, encoded: Encoded, *, is_last: bool) -> bool:
        """Seal what is in the slot and send it. Returns False when the transfer ended meanwhile."""
        header = FrameHeader(
            transfer_id=outgoing.transfer_id,
            sender_epoch=self._pair.sender_epoch,
            receiver_epoch=self._pair.receiver_epoch,
            link_epoch=self.link.epoch,
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
        is_backlogged = not is_last or self._is_next_ready()
        if not self.link.send(outgoing, slot, message_bytes, payload_bytes, is_backlogged=is_backlogged):
            return False
        outgoing.payload_bytes += payload_bytes
        outgoing.num_frames += 1
        if outgoing.num_frames == 1:
            self._hooks.on_first_frame(outgoing)
        self._metrics.frames_sent.inc()
        self._metrics.payload_sent.inc(payload_bytes)
        return True

    def _drop_link(self, error: LinkError, item: LineItem | None) -> None:
        """Break the link and fail what was on it. Transfers that have sent nothing go on over the next link.

        When not even opening worked (there was no link), whoever waits for one fails now: a peer that cannot be
        reached costs one timeout, not one per transfer.
        """
        was_open = self.link.drop()
        stranded: dict[int, Outgoing] = {}
        with self._changed:
            if item is not None:
                outgoing = item.outgoing
                if was_open and not (outgoing.num_frames or outgoing.has_moved):
                    # The link broke before this transfer, while it was idle: no reason to fail.
                    outgoing.has_moved, outgoing.link_epoch = True, None
                    self._line.put_back(item)
                else:
                    item.discard()
                    stranded[id(outgoing)] = outgoing
            for waiting in [outgoing for outgoing, _ in self._queue] + self._line.transfers():
                if not was_open or waiting.num_frames:
                    stranded[id(waiting)] = waiting
            self._queue = deque(queued for queued in self._queue if id(queued[0]) not in stranded)
        self._line.drop(stranded)
        if not self.link.is_closing:
            reason = error.nack_reason if isinstance(error, QuotaExceeded) else NackReason.LINK_LOST
            for lost in stranded.values():
                self._fail(lost, reason, error.detail)
            self._hooks.on_link_lost(error.detail, is_unreachable=isinstance(error, Unreachable))

    def _fail(self, outgoing: Outgoing, reason: NackReason, detail: str) -> None:
        outgoing.gate.close(lambda: None)  # nothing of it is read again, whatever is still queued
        self._hooks.on_failed(outgoing, reason, detail)
