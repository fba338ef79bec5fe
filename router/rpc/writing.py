"""Writing to clients that may have stopped reading."""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import grpc

from core.errors import SlowReader
from router.generation.pieces import Pieces

_Context = grpc.aio.ServicerContext[Any, Any]
_Piece = TypeVar("_Piece")
_Told = TypeVar("_Told", contravariant=True)


class Events(Protocol[_Told]):
    """An answer in the words of one method."""

    def started(self) -> object: ...

    def of(self, pieces: Sequence[_Told]) -> Sequence[object]: ...


async def stream(context: _Context, answer: Pieces[_Piece], events: Events[_Piece], timeout_s: float) -> None:
    """Send an answer to its end.

    Raises:
        ServingError: the answer failed, or nobody reads it for `timeout_s`. Nothing of it runs on, then as always.
    """
    writer = Writer(context, timeout_s)
    try:
        pieces = await answer.take()
        await writer.write(events.started())
        while True:
            for event in events.of(pieces):
                await writer.write(event)
            if answer.is_over:
                return
            pieces = await answer.take()
    finally:
        writer.close()
        # Cancelled by the client, its deadline or a broken connection: all workers are told to free it.
        answer.abandon("the client went away")


class Writer:
    """Writes to one call, from the task that serves it, and cuts it off when a message waits for too long.

    One timer looks now and then how long the message of the moment has waited: one for each message would cost more
    than the messages do.
    """

    def __init__(self, context: _Context, timeout_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None, "gRPC serves every call in a task"
        self._write = context.write
        self._timeout_s = timeout_s
        self._task = task
        self._num_cancellings = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._began_at: float | None = None
        self._is_cut = False
        self._timer = self._loop.call_later(timeout_s, self._look)

    def close(self) -> None:
        self._timer.cancel()

    async def write(self, message: object) -> None:
        """Send one message. Raises: SlowReader, when the client lets it wait for longer."""
        self._began_at = self._loop.time()
        try:
            await self._write(message)
        except asyncio.CancelledError as error:
            if self._is_cut and self._task.uncancel() <= self._num_cancellings:
                raise SlowReader(f"no message was read for {self._timeout_s:g} s") from error
            raise
        finally:
            self._began_at = None

    def _look(self) -> None:
        now = self._loop.time()
        due_at = self._timeout_s + (now if self._began_at is None else self._began_at)
        if due_at <= now:
            self._is_cut = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(due_at, self._look)
