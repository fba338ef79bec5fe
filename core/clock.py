"""Time as an argument: services are given a clock, tests give one that they turn by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """Source of monotonic seconds. No absolute time ever crosses a process border."""

    def now(self) -> float:
        """Return seconds since an arbitrary start of this process."""
        ...


class MonotonicClock:
    """The real clock."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to; for tests and simulation."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (>= 0)."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self._now_s += seconds
