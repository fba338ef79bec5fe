"""Timers of the shells: one for all deadlines of a state machine, one that keeps reports from coming too often."""

import asyncio
from collections.abc import Callable

from core.clock import Clock


class Alarm:
    """Calls `on_due` on the event loop when the armed deadline has passed.

    Concurrency: the event loop's thread only.
    """

    def __init__(self, clock: Clock, on_due: Callable[[], None]) -> None:
        self._clock = clock
        self._on_due = on_due
        self._handle: asyncio.TimerHandle | None = None
        self._deadline: float | None = None

    @property
    def is_armed(self) -> bool:
        return self._deadline is not None

    def arm(self, deadline: float | None) -> None:
        """Ring at `deadline` (the clock's seconds) and at no other time; None disarms."""
        if deadline == self._deadline:
            return
        self.disarm()
        if deadline is not None:
            self._deadline = deadline
            delay_s = max(0.0, deadline - self._clock.now())
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def arm_by(self, deadline: float | None) -> None:
        """Ring no later than `deadline`: for many sessions that share one alarm; being early is harmless to them."""
        if deadline is not None and (self._deadline is None or deadline < self._deadline):
            self.arm(deadline)

    def disarm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._deadline = None

    def _ring(self) -> None:
        self._handle = self._deadline = None
        self._on_due()


class Pacer:
    """Calls `act` soon after every `ask`, but no two calls closer than `interval_s`: what is asked between is one.

    Concurrency: the event loop's thread only.
    """

    def __init__(self, clock: Clock, interval_s: float, act: Callable[[], None]) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._act = act
        self._earliest = clock.now()
        self._alarm = Alarm(clock, self._run)

    def ask(self) -> None:
        if not self._alarm.is_armed:
            self._alarm.arm(max(self._earliest, self._clock.now()))

    def close(self) -> None:
        self._alarm.disarm()

    def _run(self) -> None:
        self._earliest = self._clock.now() + self._interval_s
        self._act()
