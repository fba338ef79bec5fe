"""A token bucket as arithmetic: what the memory store keeps, what the Redis script does, what a gateway falls back to.

A bucket that nobody has touched is full. What may be taken:
1. No more than is in it, or
2. more than it can ever hold, once it is full: a request larger than a whole minute's tokens is served and leaves a
   debt, instead of being refused for ever, or
3. anything, when the take is forced: what has been used already must be counted.
A negative amount gives back, up to the capacity. Pure: the time is an argument.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BucketTake:
    """Take `amount` from the bucket `key` that holds `capacity` (> 0) and gains `refill_per_s` (> 0)."""

    key: str
    amount: float
    capacity: float
    refill_per_s: float


@dataclass(slots=True)
class TokenBucket:
    """What is in one bucket, as of `at_s`; below 0: a debt."""

    level: float
    at_s: float

    def refill(self, take: BucketTake, now: float) -> None:
        """Bring the level to `now`. A smaller capacity than before cuts it."""
        gained = max(0.0, now - self.at_s) * take.refill_per_s
        self.level = min(take.capacity, self.level + gained)
        self.at_s = now

    def wait_s(self, take: BucketTake) -> float:
        """Return how long until `take` is allowed; 0: now. Pure; call `refill` before."""
        return max(0.0, min(take.amount, take.capacity) - self.level) / take.refill_per_s

    def take(self, take: BucketTake) -> None:
        """Take it, allowed or not."""
        self.level = min(take.capacity, self.level - take.amount)
