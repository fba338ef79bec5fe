"""The sender's end of a pair's link over all its epochs: opening it, credit, slots, rate, giving it up.

Belongs to the sender thread. The event loop tells it what the receiver says, and any thread may close it; they meet
under the condition that the sender thread waits on, so that one wait can be for a part, for credit or for the end.
"""

import itertools
import threading

from kv_transfer.config import MAX_SLOT_BYTES, MIN_SLOT_BYTES
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import LinkError, LinkPlan, PairIdentity, SendEnd, Slot
from kv_transfer.sender.link_gauge import LinkGauge
from kv_transfer.sender.link_quota import LinkHolder
from kv_transfer.sender.outgoing import OpenedLink, Outgoing, PumpHooks
from kv_transfer.sender.parts import SenderParts
from kv_transfer.sender.rate_cap import RateCap


class Unreachable(LinkError):
    """The link could not be opened: the peer did not come, or not to where this side looks."""


class SendLink:
    """The link of one pair, open or not."""

    def __init__(
        self,
        parts: SenderParts,
        pair: PairIdentity,
        holder: LinkHolder,
        hooks: PumpHooks,
        changed: threading.Condition,
    ) -> None:
        """`changed` is notified whenever something may go on."""
        self._config = parts.config
        self._pair = pair
        self._links = links = parts.links
        self._quota = parts.quota
        self._holder = holder
        self._hooks = hooks
        self._metrics = parts.metrics
        self._clock = parts.clock
        self._changed = changed
        rate = parts.config.rate_limit_bytes_per_s
        self.gauge = LinkGauge(parts.clock, rate, "" if links.backend == "auto" else links.backend)
        self._rate_cap = None if rate is None else RateCap(rate)
        self._end: SendEnd | None = None
        self._spare: Slot | None = None  # acquired, and then not needed
        self._opened: OpenedLink | None = None
        self._credit_bytes = 0
        self._window_bytes = 0
        self._distrusted_epoch = 0
        self._epochs = itertools.count(1)
        self.epoch = 0
        self.payload_room = 0  # of a slot; 0 until the first link is open
        self.is_in_flight = False  # something was sent, and has not been seen to leave
        self.is_closing = False

    # --- from other threads -------------------------------------------------------------------------------------------

    def grant(self, credit_bytes: int) -> None:
        """Add credit. The first grant of a link is its window, which the balance never exceeds."""
        with self._changed:
            self._window_bytes = self._window_bytes or credit_bytes
            self._credit_bytes = min(self._credit_bytes + credit_bytes, self._window_bytes)
            self._changed.notify()

    def opened(self, opened: OpenedLink) -> None:
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

    def close(self) -> None:
        """Unblock the sender thread: nothing is sent any more."""
        with self._changed:
            self.is_closing = True
            self._changed.notify()
            end = self._end
        if end is not None:
            end.abort()

    # --- the sender thread's own --------------------------------------------------------------------------------------

    @property
    def is_distrusted(self) -> bool:
        return self._end is not None and self.epoch <= self._distrusted_epoch

    def ensure(self) -> None:
        """Open the link if it is not.

        Raises:
            Unreachable: the other end did not come.
            QuotaExceeded: too many links are open, and none is idle.
        """
        if self._end is not None:
            return
        self._quota.open(self._pair.receiver_id, self._holder, self._config.open_timeout_s)
        epoch = next(self._epochs)
        try:
            opened = self._ask(epoch)
            plan = LinkPlan(
                self._pair.link_name(epoch),
                opened.slot_bytes,
                self._config.num_slots,
                self._config.open_timeout_s,
                self._config.send_timeout_s,
            )
            end = self._links.open_send(opened.address, plan)
        except LinkError as error:
            raise Unreachable(error.detail) from error
        self.gauge.opened(epoch, end.carrier)
        with self._changed:
            self._end = end
            must_abort = self.is_closing
        if must_abort:
            end.abort()
        self.epoch = epoch
        self.payload_room = opened.slot_bytes - HEADER_BYTES
        self._metrics.links.labels("sender").inc()

    def room_for(self, outgoing: Outgoing, num_bytes: int) -> Slot | None:
        """Take credit and a slot for a payload, waiting for both. Returns None when the transfer has ended.

        Raises:
            LinkError: neither came in time: the receiver, or the link, is stuck.
        """
        self.ensure()
        assert self._end is not None
        if outgoing.link_epoch not in (None, self.epoch):
            return None  # its earlier frames died with their link; the loop is about to end it
        timeout_s = self._config.send_timeout_s
        with self._changed:
            has_changed = self._changed.wait_for(
                lambda: self._credit_bytes >= num_bytes or outgoing.gate.is_closed or self.is_closing, timeout_s
            )
            if not has_changed:
                raise LinkError(f"the receiver granted no credit for {timeout_s:g} s")
            if outgoing.gate.is_closed or self.is_closing:
                return None
            self._credit_bytes -= num_bytes
        self._spare = self._spare or self._end.acquire(timeout_s)
        return self._spare

    def send(
        self, outgoing: Outgoing, slot: Slot, message_bytes: int, payload_bytes: int, *, is_backlogged: bool
    ) -> bool:
        """Send a sealed slot when the rate cap lets it pass. Returns False when the transfer ended meanwhile.

        Raises:
            LinkError: broken, or the receiver has said that it is lost.
        """
        if not self._wait_for_rate(outgoing, message_bytes):
            self.grant(payload_bytes)
            return False
        # Atomic against `distrust`: whoever is told of the loss afterwards finds the transfer bound to this link.
        with self._changed:
            if self._end is None or self.is_distrusted:
                raise LinkError("the receiver lost the link")
            outgoing.link_epoch = self.epoch
            end = self._end
        self._spare = None
        outgoing.last_link_bytes = self.gauge.sent(payload_bytes, is_backlogged=is_backlogged)
        end.send(slot, message_bytes)
        self.is_in_flight = True
        return True

    def flush(self) -> None:
        """See that what was sent has left.

        Raises:
            LinkError: it has not.
        """
        if self._end is not None:
            self._end.flush(self._config.send_timeout_s)
        self.is_in_flight = False

    def give_up(self) -> None:
        """Close a link that nobody needs now, so that another peer's may open."""
        if self._end is not None:
            self.flush()
            self.drop()

    def drop(self) -> bool:
        """Close the link, whatever its state. Returns whether there was one."""
        with self._changed:
            end, self._end = self._end, None
        self._spare = None
        self.is_in_flight = False
        if end is not None:
            end.close()
        self._quota.closed(self._pair.receiver_id, self._holder)
        return end is not None

    def _ask(self, epoch: int) -> OpenedLink:
        """Have the receiver open its end."""
        self._hooks.on_link_needed(epoch)
        with self._changed:
            self._changed.wait_for(
                lambda: (self._opened is not None and self._opened.link_epoch == epoch) or self.is_closing,
                self._config.open_timeout_s,
            )
            opened = self._opened
        if opened is None or opened.link_epoch != epoch:
            raise LinkError("the receiver did not open its end")
        if opened.backend != self._links.backend:
            raise LinkError(f"the receiver's links are {opened.backend}, ours are {self._links.backend}")
        if not MIN_SLOT_BYTES <= opened.slot_bytes <= MAX_SLOT_BYTES:  # so much is allocated here
            raise LinkError(f"the receiver names slots of {opened.slot_bytes} bytes")
        return opened

    def _wait_for_rate(self, outgoing: Outgoing, num_bytes: int) -> bool:
        if self._rate_cap is None:
            return True
        delay_s = self._rate_cap.delay_s(self._clock.now(), num_bytes)
        with self._changed:
            has_ended = self._changed.wait_for(lambda: outgoing.gate.is_closed or self.is_closing, delay_s)
        if has_ended:
            self._rate_cap.withdraw(num_bytes)
        return not has_ended
