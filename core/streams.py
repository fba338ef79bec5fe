"""The way out of a bidirectional stream: anything on the event loop puts, one writer takes, memory is bounded.

A peer that stops reading must not grow our queue for ever, and its answers may not be dropped one by one either (a gap
in a token stream is worse than its end). So a full outbox ends the stream, with an error that says why.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from core.errors import ProtocolError, ServingError

T = TypeVar("T")


class Outbox(Generic[T]):
    """Queue of one stream.

    Concurrency: one event loop, many putters, one taker (`async for`).
    """

    def __init__(self, max_items: int) -> None:
        self._items: deque[T] = deque()
        self._max_items = max_items
        self._changed = asyncio.Event()
        self._closed = False
        self._error: ServingError | None = None

    @property
    def is_closed(self) -> bool:
        return self._closed

    def put(self, item: T) -> None:
        """Queue `item`. After `close` it is dropped: the peer of an ended stream is owed nothing."""
        if self._closed:
            return
        if len(self._items) >= self._max_items:
            self._items.clear()
            self.close(ProtocolError(f"the peer left {self._max_items} messages unread"))
            return
        self._items.append(item)
        self._changed.set()

    def close(self, error: ServingError | None = None) -> None:
        """End the stream once what is queued was taken; then raise `error` in the taker, if given. Idempotent."""
        if not self._closed:
            self._closed = True
            self._error = error
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            while self._items:
                yield self._items.popleft()
            if self._closed:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
