"""Who will join which decode batch, and when: the part of the decode load that no report shows yet.

Requests whose prompt is being computed will be in a batch only when their KV has landed. Counting them at once makes
decode pools look full while prompts compute; not counting them sends everybody to the worker that is idle now. Either
makes the two pools swing against each other. So each is counted from the time at which it is expected, in buckets of a
ring over absolute time. A bucket that has passed falls into the row's `due` columns: late is still coming.
"""

import math

import numpy as np
from numpy.typing import NDArray

from router.routing.columns import FORECAST_BUCKETS


class DecodeForecast:
    """The ring of all workers. Concurrency: one thread.

    Attributes:
        joins: float64 [slots, buckets, 2]: (requests, context tokens) that join in the bucket's time.
    """

    def __init__(self, bucket_s: float) -> None:
        self.joins: NDArray[np.float64] = np.zeros((0, FORECAST_BUCKETS, 2))
        self._bucket_s = bucket_s
        self._cursor = 0  # absolute number of the earliest bucket in the ring

    def grow(self, num_slots: int) -> None:
        wider = np.zeros((num_slots, FORECAST_BUCKETS, 2))
        wider[: len(self.joins)] = self.joins
        self.joins = wider

    def clear(self, slot: int) -> None:
        self.joins[slot] = 0.0

    def advance(self, rows: np.ndarray, now: float) -> None:
        """Let the buckets before `now` fall into the `due` columns of `rows`."""
        current = math.floor(now / self._bucket_s)
        if current <= self._cursor:
            return
        for bucket in range(self._cursor, min(current, self._cursor + FORECAST_BUCKETS)):
            place = bucket % FORECAST_BUCKETS
            rows["due_requests"] += self.joins[:, place, 0]
            rows["due_tokens"] += self.joins[:, place, 1]
            self.joins[:, place] = 0.0
        self._cursor = current

    def join(self, rows: np.ndarray, slot: int, ready_at: float, tokens: int) -> int:
        """Count one request from `ready_at` on; return its bucket, for `leave`."""
        bucket = min(math.floor(ready_at / self._bucket_s), self._cursor + FORECAST_BUCKETS - 1)
        self._count(rows, slot, bucket, 1, tokens)
        return bucket

    def leave(self, rows: np.ndarray, slot: int, bucket: int, tokens: int) -> None:
        """The request of that bucket is in the batch, or will never be."""
        self._count(rows, slot, bucket, -1, -tokens)

    def _count(self, rows: np.ndarray, slot: int, bucket: int, requests: int, tokens: int) -> None:
        if bucket < self._cursor:
            rows["due_requests"][slot] += requests
            rows["due_tokens"][slot] += tokens
        else:
            place = self.joins[slot, bucket % FORECAST_BUCKETS]
            place[0] += requests
            place[1] += tokens
