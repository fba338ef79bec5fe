"""An event that happens again and again, for any number of waiters. (asyncio.Event must be cleared, by one of them.)"""

import asyncio


class Broadcast:
    """Concurrency: one event loop."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody who waits now."""
        happened, self._next = self._next, asyncio.Event()
        happened.set()

    def next(self) -> asyncio.Event:
        """Return what the next `notify` sets. Taken before looking at the facts, nothing is missed while looking."""
        return self._next
