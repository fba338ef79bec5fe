"""How fast a link is: goodput and round trip, from what was sent and what the receiver says it has consumed.

Follows the delivery-rate idea of BBR: a sample is the bytes delivered between two acknowledgements over the time in
between, and says nothing about the wire when the sender was what it waited for. What is different here:
acknowledgements tell of consumption by the receiver (credit, or the ACK of a transfer), never of a socket that
swallowed a message, so they may cover many messages at once and come long after the last byte; and a link may be busy
for seconds or for two milliseconds at a time.

Samples begin where the last one ended, or where the link stopped being idle. Each thing that makes them worth less is
met:

- A sender with nothing to send makes a fast link look slow. Such samples may raise the estimate and never lower it:
  those with a lull (a message had nothing behind it, and the next one came later), and those of a lone message. Not of
  every lone message, or a link that only ever carries 100 KB at a time could not be learned: one whose delivery took
  many round trips, and longer than a thread may wait for its turn, was held up by the wire, whatever its sender had
  behind it.
- A short message measures the round trip. It updates `rtt_s` and nothing else. For longer ones that were sent into an
  idle link the round trip is taken off the time, at most half of it.
- Acknowledgements that come in one bunch are one sample, not one slow and many fast ones.
- The first transfer of a link pays page faults, slow start and cold caches. It teaches only the round trip.

Samples are averaged as logarithms, so that a link that gets fifty times slower is believed as fast as one that gets
fifty times faster: the error halves with every sample, and faster when two in a row surprise in the same direction.

Source: Cheng, Cardwell, Hassas Yeganeh, Jacobson: Delivery Rate Estimation (IETF, draft-cheng-iccrg).
"""

import math
from collections import deque
from dataclasses import dataclass

MIN_SAMPLE_BYTES = 64 * 1024
_MIN_SAMPLE_S = 0.001  # acknowledgements closer than this are a bunch
_WARM_UP_SAMPLES = 4  # a first transfer that does not end is trusted after so many
_MAX_WEIGHT, _MIN_WEIGHT, _SURPRISED_WEIGHT = 0.5, 0.25, 0.8
_FULL_WEIGHT_BYTES, _FULL_WEIGHT_S = 512 * 1024, 0.05  # a sample this large, or this long, has the full weight
_SURPRISE = math.log(2.0)
_WIRE_BOUND_ROUND_TRIPS = 4.0
_WIRE_BOUND_S = 0.01  # a thread that waits for a processor loses this much, too
_LULL_RATIO = 0.25
_RTT_WEIGHT = 0.125
_RTT_MEMORY_SAMPLES = 64  # the minimum is forgotten after so many round trips: routes change
_MAX_UNACKNOWLEDGED = 16_384  # messages; of a receiver that grants credit and tells nothing, the oldest have arrived
_MIN_INTERVAL_S = 1e-6  # less is a clock, not a wire


@dataclass(frozen=True, slots=True)
class _Send:
    """One message at the moment when it was handed to the link, and all lulls of the sender before it."""

    start: int
    stop: int
    at: float
    lull_s: float
    is_backlogged: bool


@dataclass(frozen=True, slots=True)
class _Anchor:
    """Where the next sample begins."""

    delivered: int
    at: float
    sent_at: float
    lull_s: float
    is_idle: bool  # nothing was in flight: the first acknowledgement takes a round trip longer


class GoodputEstimator:
    """Estimates of one pair. Pure but for its memory; times are arguments; not thread-safe."""

    def __init__(self) -> None:
        self._log_rate: float | None = None
        self._rtt_min: float | None = None
        self._rtt_mean: float | None = None
        self._num_round_trips = 0
        self._last_surprise = 0
        self._unacknowledged: deque[_Send] = deque()
        self._sent = self._delivered = 0
        self._lull_s = 0.0
        self._anchor = _Anchor(0, 0.0, 0.0, 0.0, is_idle=True)
        self._is_warm = False
        self._num_cold_samples = 0

    @property
    def goodput_bytes_per_s(self) -> float | None:
        """Consumed bytes per second while the link is the bottleneck; None while nothing was measured."""
        return None if self._log_rate is None else math.exp(self._log_rate)

    @property
    def rtt_s(self) -> float | None:
        """Hand-over to acknowledgement of a small message; None while nothing was measured."""
        return self._rtt_mean

    @property
    def in_flight_bytes(self) -> int:
        """Sent and not known to be consumed."""
        return self._sent - self._delivered

    def link_opened(self) -> None:
        """Begin to count from zero: a new link of the same pair. What was learned stays; its first transfer is cold."""
        self._unacknowledged.clear()
        self._sent = self._delivered = 0
        self._is_warm = False
        self._num_cold_samples = 0

    def sent(self, now: float, cumulative_bytes: int, is_backlogged: bool) -> None:
        """A message is about to be handed to the link.

        Args:
            cumulative_bytes: on this link, this message included.
            is_backlogged: more was ready to be sent behind it.
        """
        if cumulative_bytes <= self._sent:
            return
        if not self._unacknowledged:
            self._anchor = _Anchor(self._delivered, now, now, self._lull_s, is_idle=True)
        elif not self._unacknowledged[-1].is_backlogged:
            self._lull_s += now - self._unacknowledged[-1].at
        if len(self._unacknowledged) >= _MAX_UNACKNOWLEDGED:
            self._delivered = self._unacknowledged.popleft().stop
        self._unacknowledged.append(_Send(self._sent, cumulative_bytes, now, self._lull_s, is_backlogged))
        self._sent = cumulative_bytes

    def acknowledged(self, now: float, cumulative_bytes: int) -> None:
        """The receiver has consumed so much of this link; late and repeated news are ignored."""
        delivered = min(cumulative_bytes, self._sent)
        if delivered <= self._delivered:
            return
        self._delivered = delivered
        newest = self._unacknowledged[0]
        while self._unacknowledged and self._unacknowledged[0].start < delivered:
            newest = self._unacknowledged[0]
            if newest.stop > delivered:
                break  # a part of it
            self._unacknowledged.popleft()
        num_bytes, elapsed = delivered - self._anchor.delivered, now - self._anchor.at
        is_drained = not self._unacknowledged
        if not is_drained and (num_bytes < MIN_SAMPLE_BYTES or elapsed < _MIN_SAMPLE_S):
            return
        self._learn(newest, num_bytes, elapsed)
        self._anchor = _Anchor(delivered, now, newest.at, newest.lull_s, is_idle=False)
        self._is_warm = self._is_warm or is_drained

    def exchanged(self, rtt_s: float) -> None:
        """A small question and its answer took so long."""
        self._num_round_trips += 1
        if self._rtt_min is None or rtt_s < self._rtt_min or self._num_round_trips % _RTT_MEMORY_SAMPLES == 0:
            self._rtt_min = rtt_s
        self._rtt_mean = rtt_s if self._rtt_mean is None else self._rtt_mean + _RTT_WEIGHT * (rtt_s - self._rtt_mean)

    def _learn(self, newest: _Send, num_bytes: int, elapsed: float) -> None:
        anchor = self._anchor
        if num_bytes < MIN_SAMPLE_BYTES:
            if anchor.is_idle:
                self.exchanged(max(0.0, elapsed))
            return
        if not self._is_warm:
            self._num_cold_samples += 1
            self._is_warm = self._num_cold_samples >= _WARM_UP_SAMPLES
            return
        if elapsed <= 0:  # dated by another clock
            return
        latency = self._rtt_min or 0.0
        interval = max(elapsed - latency, elapsed / 2) if anchor.is_idle else elapsed
        lull_s = newest.lull_s - anchor.lull_s
        if lull_s > 0:  # what was consumed long ago may be acknowledged just now
            interval = max(interval, newest.at - anchor.sent_at)
        interval = max(interval, _MIN_INTERVAL_S)
        is_short = elapsed < max(_WIRE_BOUND_ROUND_TRIPS * latency, _WIRE_BOUND_S)
        is_lone = anchor.is_idle and not newest.is_backlogged and is_short
        has_lull = lull_s > _LULL_RATIO * elapsed
        self._average(math.log(num_bytes / interval), num_bytes, interval, can_lower=not (is_lone or has_lull))

    def _average(self, log_rate: float, num_bytes: int, interval_s: float, *, can_lower: bool) -> None:
        if self._log_rate is None:
            self._log_rate = log_rate
            return
        error = log_rate - self._log_rate
        if error < 0 and not can_lower:
            return
        surprise = 0 if abs(error) < _SURPRISE else (1 if error > 0 else -1)
        if surprise and surprise == self._last_surprise:
            weight = _SURPRISED_WEIGHT
        else:
            fullness = max(num_bytes / _FULL_WEIGHT_BYTES, interval_s / _FULL_WEIGHT_S)
            weight = min(_MAX_WEIGHT, max(_MIN_WEIGHT, _MAX_WEIGHT * fullness))
        self._last_surprise = surprise
        self._log_rate += weight * error
