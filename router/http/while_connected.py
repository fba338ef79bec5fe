"""Work for a client for as long as it is there.

A response of our own kind, because what FastAPI's do is needed neither for one JSON text nor for a stream, and because
errors that come before the first byte must still become a status."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from core.errors import ServingError
from router.http.errors import ErrorReply, error_reply
from router.http.sse import encode

Work = Callable[[Send], Awaitable[None]]
"""Sends a whole response, or raises a ServingError before it sends anything."""


class WhileConnected(Response):
    """Runs `work`, and cancels it at once when the client goes away."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.create_task(self._run(send), name="http answer")
        watching = asyncio.create_task(_until_gone(receive), name="http client")
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_done = working.done()
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)
        if is_done:
            working.result()

    async def _run(self, send: Send) -> None:
        try:
            await self._work(send)
        except ServingError as error:
            await send_error(send, error_reply(error))


async def _until_gone(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def send_json(send: Send, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Send a whole response."""
    body = encode(value).encode()
    told = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send_head(send, status, told)
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, reply: ErrorReply) -> None:
    """Send an error object."""
    await send_json(send, reply.body, reply.status, reply.headers)


async def send_head(send: Send, status: int, headers: dict[str, str]) -> None:
    """Begin a response."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A whole response that is there already."""
    return Response(encode(value).encode(), status, headers, media_type="application/json")
