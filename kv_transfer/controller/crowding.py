"""What a transfer costs others: the delay of those that will queue behind it on its link.

With arrivals at rate l and a stage that works s seconds for this transfer, whoever comes before the queue has run empty
waits s longer. With W seconds of work ahead, that is expected to last (W + s/2) / (1 - l s) seconds, so the price is
l s (W + s/2) / (1 - l s*), where s* is the shortest possible s: a choice that would choke the link must not look as if
it were the link's nature. Without it, a slow profile with little latency of its own is chosen until the queue explodes.

Source: the mean busy period of an M/G/1 queue (Kleinrock, Queueing Systems I, 5.8), as a marginal price.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

_RATE_MEMORY = 0.1  # weight of the newest gap between arrivals
_MAX_UTILISATION = 0.8
_MAX_LINKS = 4096
_IDLE_S = 10.0  # a gap longer than this says that the load is over


class Crowding:
    """Arrival rates per link, and how long the codec threads are busy. Times are arguments."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._last: OrderedDict[str, tuple[float, float]] = OrderedDict()  # when, mean gap
        self._encoding_until = 0.0
        self._num_outstanding = 0

    def asked(self, peer: str, now: float) -> float:
        """Note an arrival. Returns arrivals per second on the link; 0 while unknown."""
        last = self._last.pop(peer, None)
        if last is None:
            mean_gap_s = math.inf
        else:
            at, before_s = last
            gap_s = now - at
            if before_s == math.inf or gap_s > _IDLE_S:
                mean_gap_s = gap_s
            else:
                mean_gap_s = before_s + _RATE_MEMORY * (gap_s - before_s)
        self._last[peer] = (now, mean_gap_s)
        if len(self._last) > _MAX_LINKS:
            self._last.popitem(last=False)
        return 1.0 / max(mean_gap_s, 1e-4)

    def pricing(self, least_occupancy_s: float, queue_s: float, arrival_rate: float) -> Callable[[float], float]:
        """Return the function from an occupancy to the expected sum of the delays of others. Changes nothing."""
        utilisation = min(_MAX_UTILISATION, arrival_rate * least_occupancy_s)
        scale = self._weight * arrival_rate / (1.0 - utilisation)
        return lambda occupancy_s: scale * occupancy_s * (queue_s + occupancy_s / 2)

    def encode_backlog_s(self, now: float) -> float:
        """Return the estimate of the time until the codec threads are free."""
        return max(0.0, self._encoding_until - now)

    def chosen(self, encode_s: float, now: float) -> None:
        """Note that a transfer will keep all codec threads busy for `encode_s`."""
        self._num_outstanding += 1
        self._encoding_until = max(now, self._encoding_until) + encode_s

    def ended(self, now: float) -> None:
        """Note that a transfer ended. With none left, nothing is being encoded, whatever was estimated."""
        self._num_outstanding -= 1
        if self._num_outstanding <= 0:
            self._num_outstanding = 0
            self._encoding_until = now
