"""A client of resumable streams in tests: it counts what it has seen, over any number of connections."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.fakes.script import PATIENCE_S


class ResumingReader:
    """Reads one Generate stream."""

    def __init__(self, request_id: str, tenant: str = "") -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.events: list[pb.GenerateResponse] = []
        self.on_event: Callable[[], None] = lambda: None

    @property
    def numbers(self) -> list[int]:
        return [event.event_index for event in self.events]

    @property
    def is_over(self) -> bool:
        return bool(self.events) and self.events[-1].HasField("finished")

    async def begin(self, channel: grpc.aio.Channel, asked: pb.GenerateRequest, count: int | None = None) -> None:
        """Read the first events, or all, and leave."""
        await self._read(inference_pb2_grpc.InferenceStub(channel).Generate(asked), lambda event: event, count)

    async def resume(self, channel: grpc.aio.Channel, count: int | None = None) -> None:
        """Read further events, or all that are left, and leave."""
        await self._read(self.resuming(channel), lambda response: response.generate, count)

    def resuming(self, channel: grpc.aio.Channel) -> Any:
        """Begin to read on."""
        last = self.events[-1].event_index if self.events else None
        asked = pb.ResumeRequest(request_id=self.request_id, last_event_index=last, tenant=self.tenant)
        return inference_pb2_grpc.InferenceStub(channel).Resume(asked)

    async def fails(self, channel: grpc.aio.Channel) -> tuple[grpc.StatusCode, str]:
        """Read on to the end, which must be a failure; return which."""
        try:
            await self.resume(channel)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError(f"the stream ended well after {len(self.events)} events")

    async def _read(self, call: Any, event_of: Callable[[Any], pb.GenerateResponse], count: int | None) -> None:
        wanted = None if count is None else len(self.events) + count
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for message in call:
                    self.events.append(event_of(message))
                    self.on_event()
                    if len(self.events) == wanted:
                        break
        finally:
            call.cancel()


def same_words(events: Sequence[pb.GenerateResponse]) -> tuple[object, ...]:
    """Return what two runs of one request have in common: all but times, and how tokens were cut into events."""
    return (
        "".join(event.delta.text for event in events),
        [(token.index, token.token_id) for event in events for token in event.delta.tokens],
        [(one.finished.reason, one.finished.usage.completion_tokens) for one in events if one.HasField("finished")],
        [event.started.prompt_tokens for event in events if event.HasField("started")],
    )
