"""The one timer of a service: armed for the earliest deadline of all its sessions."""

import asyncio
from collections.abc import Callable

from core.clock import Clock


class DeadlineTimer:
    """Calls back once when the earliest armed deadline passes; the callback arms the next. Event loop only."""

    def __init__(self, clock: Clock, on_due: Callable[[], None]) -> None:
        self._clock = clock
        self._on_due = on_due
        self._armed_at: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    def arm(self, at: float | None) -> None:
        """Make sure that the callback comes no later than `at`. Being early is harmless."""
        if at is None or (self._armed_at is not None and self._armed_at <= at):
            return
        self.disarm()
        self._armed_at = at
        self._handle = asyncio.get_running_loop().call_later(max(0.0, at - self._clock.now()), self._fire)

    def disarm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._armed_at = None

    def _fire(self) -> None:
        self._handle = self._armed_at = None
        self._on_due()
