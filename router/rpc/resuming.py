"""Answers that outlive their calls: as bytes of messages for their logs, and from their logs to clients."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from protos import inference_pb2 as pb
from router.generation.pieces import Pieces
from router.resume.events import StreamKind
from router.resume.port import Follower
from router.rpc.writing import Writer

_Piece = TypeVar("_Piece")
_Told = TypeVar("_Told", contravariant=True)


class Messages(Protocol[_Told]):
    """An answer in the words of one method."""

    def started(self) -> Message: ...

    def of(self, pieces: Sequence[_Told]) -> Sequence[Message]: ...


async def batches(answer: Pieces[_Piece], messages: Messages[_Piece]) -> AsyncGenerator[list[bytes], None]:
    """Read an answer to its end, whatever becomes of its call.

    Raises:
        ServingError: the answer failed.
    """
    try:
        pieces = await answer.take()
        yield [one.SerializeToString() for one in (messages.started(), *messages.of(pieces))]
        while not answer.is_over:
            if told := messages.of(await answer.take()):
                yield [one.SerializeToString() for one in told]
    finally:
        answer.abandon("its stream is kept no longer")


async def follow(
    context: grpc.aio.ServicerContext[Any, Any],
    follower: Follower,
    read: Callable[[bytes], object],
    timeout_s: float,
) -> None:
    """Send what is logged of an answer, from where the reader is to its end.

    Args:
        read: makes a message of logged bytes.

    Raises:
        ServingError: the answer failed, or nobody reads it here for `timeout_s`.
    """
    writer = Writer(context, timeout_s)
    try:
        while events := await follower.take():
            for event in events:
                await writer.write(read(event.data))
    finally:
        writer.close()
        follower.close()


def _resumed_generate(data: bytes) -> pb.ResumeResponse:
    return pb.ResumeResponse(generate=pb.GenerateResponse.FromString(data))


def _resumed_chat(data: bytes) -> pb.ResumeResponse:
    return pb.ResumeResponse(chat=pb.ChatResponse.FromString(data))


RESUMED = {StreamKind.GENERATE: _resumed_generate, StreamKind.CHAT: _resumed_chat}
"""How logged bytes are told by Resume, by whose they are."""
