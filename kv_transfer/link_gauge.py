"""One pair's link as the sender measures it: the estimator behind a lock, and the view that the controller is given.

The sender thread tells what it hands to the link, the event loop what the receiver says has arrived.
"""

import threading

from core.clock import Clock
from kv_transfer.choice import LinkView
from kv_transfer.link_estimate import GoodputEstimator


class LinkGauge:
    """Measures one pair across its links. All methods: any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._estimator = GoodputEstimator()
        self._link_epoch = 0
        self._carrier = ""
        self._sent_bytes = 0

    def opened(self, link_epoch: int, carrier: str) -> None:
        """A link was opened: bytes count from zero. What was learned of the pair stays."""
        with self._lock:
            self._link_epoch, self._carrier, self._sent_bytes = link_epoch, carrier, 0
            self._estimator.link_opened()

    def sent(self, payload_bytes: int, *, is_backlogged: bool) -> None:
        """A frame is about to be handed to the link; `is_backlogged`: another one is ready behind it."""
        now = self._clock.now()
        with self._lock:
            self._sent_bytes += payload_bytes
            self._estimator.sent(now, self._sent_bytes, is_backlogged)

    def arrived(self, link_epoch: int, received_bytes: int) -> None:
        """The receiver has taken so much from the link; news of an older link are ignored."""
        now = self._clock.now()
        with self._lock:
            if link_epoch == self._link_epoch and received_bytes:
                self._estimator.acknowledged(now, received_bytes)

    def exchanged(self, rtt_s: float) -> None:
        """A small message was answered after so long."""
        with self._lock:
            self._estimator.exchanged(rtt_s)

    def view(self, unsent_bytes: int) -> LinkView:
        """Return the link as it is now; `unsent_bytes` wait for it."""
        with self._lock:
            estimator = self._estimator
            return LinkView(
                carrier=self._carrier,
                goodput_bytes_per_s=estimator.goodput_bytes_per_s,
                rtt_s=estimator.rtt_s,
                queued_bytes=unsent_bytes + estimator.in_flight_bytes,
            )
