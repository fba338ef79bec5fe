"""Streams that outlive their connections: as server-sent events for their logs, and from their logs to clients.

Every event has its number as `id`, so that a client that comes back says the last one that it saw in `Last-Event-ID`,
as browsers' EventSource does by itself."""

from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from starlette.types import Send

from core.errors import InvalidRequest, ServingError
from router.generation.pieces import Pieces
from router.http.errors import error_reply
from router.http.sse import DONE, json_event
from router.http.streaming import STREAM_HEADERS, Chunks
from router.http.while_connected import send_head
from router.resume.events import LoggedEvent
from router.resume.port import Follower

LAST_EVENT_ID = "last-event-id"
_MAX_DIGITS = 15
_EVENT_END = "\n\n"
T = TypeVar("T")


async def batches(answer: Pieces[T], chunks: Chunks[T]) -> AsyncGenerator[list[bytes], None]:
    """Read an answer to its end, whatever becomes of its connection.

    Raises:
        ServingError: the answer failed.
    """
    try:
        pieces = await answer.take()
        text = chunks.begin() + chunks.of(pieces)
        while not answer.is_over:
            if text:
                yield _events(text)
            text = chunks.of(await answer.take())
        yield _events(text + chunks.end() + DONE)
    finally:
        answer.abandon("its stream is kept no longer")


async def send_followed(send: Send, follower: Follower, headers: Callable[[], dict[str, str]]) -> None:
    """Send what is logged of an answer, from where the reader is to its end; 204 when nothing follows.

    Args:
        headers: asked once there is something to send.

    Raises:
        ServingError: before anything was sent.
    """
    try:
        events = await follower.take()
        if not events:  # tells an EventSource to come back no more
            await send_head(send, 204, {})
            await send({"type": "http.response.body", "body": b""})
            return
        await send_head(send, 200, STREAM_HEADERS | headers())
        while events:
            body = b"".join(_told(event) for event in events)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            try:
                events = await follower.take()
            except ServingError as error:
                await send({"type": "http.response.body", "body": json_event(error_reply(error).body).encode()})
                return
        await send({"type": "http.response.body", "body": b""})
    finally:
        follower.close()


def last_event(value: str) -> int | None:
    """Read `Last-Event-ID`; empty: from the beginning. Pure.

    Raises:
        InvalidRequest: it is none of ours.
    """
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS):
        raise InvalidRequest(LAST_EVENT_ID, f"must be the id of an event of this stream, got {value[:32]!r}")
    return int(value)


def _events(text: str) -> list[bytes]:
    return [event.encode() for event in text.split(_EVENT_END) if event]


def _told(event: LoggedEvent) -> bytes:
    return b"id: %d\n%b\n\n" % (event.number, event.data)
