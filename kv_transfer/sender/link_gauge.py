"""One pair's link as the sender measures it: the estimator behind a lock, and the view that the controller is given.

The sender thread tells what it hands to the link, the event loop what the receiver says has arrived.
"""

import threading

from core.clock import Clock
from kv_transfer.choice import LinkView
from kv_transfer.sender.link_estimate import GoodputEstimator


class LinkGauge:
    """Measures one pair across its links. All methods: any thread."""

    def __init__(self, clock: Clock, rate_limit_bytes_per_s: float | None, carrier: str = "") -> None:
        """
        Args:
            rate_limit_bytes_per_s: nobody will see more than that, whatever the link could do.
            carrier: that the first link will have; empty while that is open.
        """
        self._clock = clock
        self._rate_limit = rate_limit_bytes_per_s
        self._lock = threading.Lock()
        self._estimator = GoodputEstimator()
        self._link_epoch = 0
        self._carrier = carrier
        self._sent_bytes = 0
        self._arrived_at = 0.0

    def opened(self, link_epoch: int, carrier: str) -> None:
        """A link was opened: bytes count from zero. What was learned of the pair stays."""
        with self._lock:
            self._link_epoch, self._carrier, self._sent_bytes = link_epoch, carrier, 0
            self._estimator.link_opened()

    def sent(self, payload_bytes: int, *, is_backlogged: bool) -> int:
        """A frame is about to be handed to the link; `is_backlogged`: another one is ready behind it.

        Returns:
            The payload bytes that this link was given, with these.
        """
        now = self._clock.now()
        with self._lock:
            self._sent_bytes += payload_bytes
            self._estimator.sent(now, self._sent_bytes, is_backlogged)
            return self._sent_bytes

    def arrived(self, link_epoch: int, received_bytes: int, ago_s: float) -> None:
        """The receiver has taken so much from the link; news of an older link are ignored.

        Args:
            ago_s: on the receiver's clock, since the last of it came: time that the link is not to blame for.
        """
        now = self._clock.now()
        with self._lock:
            if link_epoch == self._link_epoch and received_bytes:
                self._arrived_at = max(self._arrived_at, now - max(0.0, ago_s))
                self._estimator.acknowledged(self._arrived_at, received_bytes)

    def exchanged(self, rtt_s: float) -> None:
        """A small message was answered after so long."""
        with self._lock:
            self._estimator.exchanged(rtt_s)

    def view(self, unsent_bytes: int) -> LinkView:
        """Return the link as it is now; `unsent_bytes` wait for it."""
        with self._lock:
            estimator = self._estimator
            goodput = estimator.goodput_bytes_per_s
            if self._rate_limit is not None:  # the cap waits where the estimator sees a sender with nothing to say
                goodput = self._rate_limit if goodput is None else min(goodput, self._rate_limit)
            return LinkView(
                carrier=self._carrier,
                goodput_bytes_per_s=goodput,
                rtt_s=estimator.rtt_s,
                queued_bytes=unsent_bytes + estimator.in_flight_bytes,
            )
