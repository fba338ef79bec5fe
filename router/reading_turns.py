"""Whose turn it is to be read: answers with news are read a few at a time, in order.

Between two such turns the event loop looks at what else came. So the reports of workers are taken in as they arrive,
however many answers wait to be written: a gateway at its limit tells its clients several tokens at once, instead of
leaving tokens, and the replies that new requests wait for, behind each other in the streams of the workers.
"""

import asyncio
from collections import deque

_AT_A_TIME = 16  # a slice of about a millisecond


class ReadingTurns:
    """The answers of one gateway that have news, in order.

    Concurrency: the event loop's thread.
    """

    def __init__(self, at_a_time: int = _AT_A_TIME) -> None:
        self._at_a_time = at_a_time
        self._waiting: deque[Bell] = deque()
        self._is_granting = False

    def ask(self, bell: "Bell") -> None:
        """`bell` rang."""
        self._waiting.append(bell)
        if not self._is_granting:
            self._is_granting = True
            asyncio.get_running_loop().call_soon(self._grant)

    def _grant(self) -> None:
        waiting = self._waiting
        for _ in range(min(self._at_a_time, len(waiting))):
            waiting.popleft().grant()
        if waiting:
            asyncio.get_running_loop().call_soon(self._grant)
        else:
            self._is_granting = False


class Bell:
    """Wakes the reader of one answer when its turn has come.

    Concurrency: the event loop's thread, one reader.
    """

    def __init__(self, turns: ReadingTurns) -> None:
        self._turns = turns
        self._has_asked = False
        self._is_granted = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """There is news. Rung again before the reader woke, it is the same news."""
        if not self._has_asked:
            self._has_asked = True
            self._turns.ask(self)

    def grant(self) -> None:
        """Its turn has come."""
        self._is_granted = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return when it rang since the last time and its turn has come."""
        if not self._is_granted:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_granted = self._has_asked = False
