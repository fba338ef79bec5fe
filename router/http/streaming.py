"""An answer to a client: in one piece, or as server-sent events, one write for each batch of tokens.

The headers of a stream are sent with the first token, so that whatever goes wrong before is a status of its own. What
goes wrong later is an event with OpenAI's error object, and the stream ends without `[DONE]`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.types import Send

from core.errors import ServingError
from router.generation.pieces import Pieces
from router.http.errors import error_reply
from router.http.sse import DONE, json_event
from router.http.while_connected import send_head, send_json

Q = TypeVar("Q", contravariant=True)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies that collect answers would spoil the time to the first token
}


class Chunks(Protocol[Q]):
    """How pieces are told: events, as text."""

    def begin(self) -> str: ...

    def of(self, pieces: Sequence[Q]) -> str: ...

    def end(self) -> str: ...


class Whole(Protocol[Q]):
    """How pieces are told at once."""

    def add(self, pieces: Sequence[Q]) -> None: ...

    def told(self) -> dict[str, Any]: ...


T = TypeVar("T")


async def send_stream(send: Send, answer: Pieces[T], chunks: Chunks[T], headers: Callable[[], dict[str, str]]) -> None:
    """Send an answer as it comes.

    Args:
        headers: what is known with the first token.

    Raises:
        ServingError: before anything was sent.
    """
    pieces = await answer.take()
    text = chunks.begin() + chunks.of(pieces)
    await send_head(send, 200, STREAM_HEADERS | headers())
    while not answer.is_over:
        if text:  # tokens that are no text yet are told with the next
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        try:
            text = chunks.of(await answer.take())
        except ServingError as error:
            await send({"type": "http.response.body", "body": json_event(error_reply(error).body).encode()})
            return
    await send({"type": "http.response.body", "body": (text + chunks.end() + DONE).encode()})


async def send_whole(send: Send, answer: Pieces[T], whole: Whole[T], headers: Callable[[], dict[str, str]]) -> None:
    """Send an answer once it is complete.

    Raises:
        ServingError: nothing was sent.
    """
    while not answer.is_over:
        whole.add(await answer.take())
    await send_json(send, whole.told(), headers=headers())
