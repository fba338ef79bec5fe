"""Writing to clients that may have stopped reading."""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import grpc

from core.errors import SlowReader

_Context = grpc.aio.ServicerContext[Any, Any]
_Piece = TypeVar("_Piece")
_Taken = TypeVar("_Taken", covariant=True)
_Told = TypeVar("_Told", contravariant=True)


class Source(Protocol[_Taken]):
    """An answer."""

    @property
    def is_over(self) -> bool: ...

    async def take(self) -> Sequence[_Taken]: ...

    def abandon(self, reason: str) -> None: ...


class Events(Protocol[_Told]):
    """An answer in the words of one method."""

    def started(self) -> object: ...

    def of(self, pieces: Sequence[_Told]) -> Sequence[object]: ...


async def stream(context: _Context, answer: Source[_Piece], events: Events[_Piece], timeout_s: float) -> None:
    """Send an answer to its end.

    Raises:
        ServingError: the answer failed, or nobody reads it for `timeout_s`. Nothing of it runs on, then as always.
    """
    try:
        pieces = await answer.take()
        await write(context, events.started(), timeout_s)
        while True:
            for event in events.of(pieces):
                await write(context, event, timeout_s)
            if answer.is_over:
                return
            pieces = await answer.take()
    finally:
        # Cancelled by the client, its deadline or a broken connection: all workers are told to free it.
        answer.abandon("the client went away")


async def write(context: _Context, message: object, timeout_s: float) -> None:
    """Send one message. Raises: SlowReader, when the client lets it wait for longer."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError as error:
        raise SlowReader(f"no message was read for {timeout_s:g} s") from error
