"""One timer for however many deadlines a state machine has: the shell arms it at the machine's `next_deadline()`."""

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

    def arm(self, deadline: float | None) -> None:
        """Ring at `deadline` (the clock's seconds) and at no other time; None disarms."""
        if deadline == self._deadline:
            return
        self.disarm()
        if deadline is not None:
            self._deadline = deadline
            delay_s = max(0.0, deadline - self._clock.now())
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def disarm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._deadline = None

    def _ring(self) -> None:
        self._handle = self._deadline = None
        self._on_due()
