"""Writing to clients that may have stopped reading."""

import asyncio
from typing import Any

import grpc

from core.errors import SlowReader


async def write(context: grpc.aio.ServicerContext[Any, Any], message: object, timeout_s: float) -> None:
    """Send one message. Raises: SlowReader, when the client lets it wait for longer."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError as error:
        raise SlowReader(f"no message was read for {timeout_s:g} s") from error
