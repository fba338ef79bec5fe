"""How many of those who wait may ask the cluster now: all, or few after everybody was refused. Knows no order.

1. OPEN. While nobody has been refused, all may ask at once.
2. A request was refused by everybody: the gate closes for a while that doubles with every such refusal in a row, with
   jitter, and a window limits how many may be unanswered at once from then on: 1 after a refusal, one more for each
   acceptance (so it doubles from round to round), no limit again once nobody waits. Each time the gate closes the
   workers were thus asked at most 2k + 1 times for k acceptances, however many wait.
3. Who asked before the gate closed and is still without an answer takes no place in the window, and its refusal tells
   nothing new; its acceptance opens the gate as any other.

Pure but for the given generator; the caller owns the time.
"""

import random
from collections.abc import Iterable

from core.ids import RequestId

_MAX_DOUBLINGS = 32


class Gate:
    """The gate.

    Args:
        retry_min_s, retry_max_s: bounds of the closed time, before a worker's own hint.
    """

    def __init__(self, *, retry_min_s: float, retry_max_s: float, rng: random.Random) -> None:
        self._retry_min_s = retry_min_s
        self._retry_max_s = retry_max_s
        self._rng = rng
        self._window: int | None = None  # None: no limit
        self._asking: set[RequestId] = set()  # released within the window, without an answer yet
        self._closed_until: float | None = None  # None: open
        self._num_refusals = 0

    @property
    def is_limited(self) -> bool:
        """Somebody was refused since the queue was last empty: the cluster takes less than what comes."""
        return self._window is not None

    @property
    def opens_at(self) -> float | None:
        """When those who wait may ask again; None: now, or as soon as an answer is there."""
        return None if self._asking else self._closed_until

    def closed_for(self, now: float) -> float:
        return 0.0 if self._closed_until is None else max(0.0, self._closed_until - now)

    def is_asking(self, request_id: RequestId) -> bool:
        """It asks within the window."""
        return request_id in self._asking

    def places(self, num_waiting: int, now: float) -> int:
        """Return how many may ask now."""
        if self._closed_until is not None and now < self._closed_until:
            return 0
        return num_waiting if self._window is None else max(0, min(num_waiting, self._window - len(self._asking)))

    def released(self, request_ids: Iterable[RequestId]) -> None:
        """They ask from now on."""
        if self._window is not None:
            self._asking.update(request_ids)

    def refused(self, request_id: RequestId, now: float, retry_after_s: float) -> None:
        """Everybody refused it."""
        if self._window is not None and request_id not in self._asking:
            return  # it asked before the gate closed: this tells nothing new
        self._window = 1
        self._asking.clear()
        backoff_s = min(self._retry_max_s, self._retry_min_s * 2.0**self._num_refusals)
        wait_s = max(backoff_s * self._rng.uniform(0.5, 1.0), min(retry_after_s, self._retry_max_s))
        self._num_refusals = min(self._num_refusals + 1, _MAX_DOUBLINGS)
        self._closed_until = now + wait_s

    def accepted(self, request_id: RequestId, *, is_queue_empty: bool) -> None:
        """The cluster has room. `is_queue_empty`: nobody is left who was not accepted."""
        self._asking.discard(request_id)
        self._closed_until = None
        self._num_refusals = 0
        if self._window is not None:
            self._window = None if is_queue_empty else self._window + 1

    def ended(self, request_id: RequestId) -> None:
        """It asks no more."""
        self._asking.discard(request_id)

    def note_capacity(self, now: float) -> None:
        """Something was freed, or a worker joined: the next question may go as early as the shortest wait allows."""
        if self._closed_until is not None:
            self._closed_until = min(self._closed_until, now + self._retry_min_s)
            self._num_refusals = 0
