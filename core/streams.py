"""Bidirectional streams, served: many putters and one writer on the way out, one reader on the way in, bounded memory.

A peer that stops reading must not grow our queue for ever, and its answers may not be dropped one by one either (a gap
in a token stream is worse than its end). So a full outbox ends the stream, with an error that says why.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from core.errors import ProtocolError, ServingError

T = TypeVar("T")
C = TypeVar("C")
W = TypeVar("W")


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


async def serve_stream(
    commands: AsyncIterator[C],
    send: Callable[[W], Awaitable[None]],
    outbox: Outbox[T],
    *,
    on_command: Callable[[C], None],
    encode: Callable[[T], W],
) -> None:
    """Run both directions of one stream until the peer, or the outbox, ends it.

    Raises:
        ServingError: a command was refused by `on_command`, or the outbox was closed with an error.
    """

    async def read() -> None:
        try:
            async for command in commands:
                on_command(command)
        except ServingError as error:
            outbox.close(error)
        finally:
            outbox.close()

    reading = asyncio.get_running_loop().create_task(read(), name="stream reader")
    try:
        async for item in outbox:
            await send(encode(item))
    finally:
        outbox.close()
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
