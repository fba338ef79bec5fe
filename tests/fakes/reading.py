"""Reading a Generate stream in tests, piece by piece or to its end."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import inference_pb2 as pb
from tests.fakes.script import PATIENCE_S


class Reading:
    """A Generate call being read, and what it has said so far."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]") -> None:
        self._call = call
        self._responses = aiter(call)
        self.started: pb.Started | None = None
        self.text = ""
        self.tokens: list[pb.GeneratedToken] = []
        self._finished: pb.Finished | None = None

    @property
    def finished(self) -> pb.Finished:
        assert self._finished is not None, "the stream did not finish"
        return self._finished

    @property
    def indices(self) -> list[int]:
        return [token.index for token in self.tokens]

    async def read_tokens(self, count: int) -> None:
        """Read until so many tokens have come."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.tokens) < count:
                self._add(await anext(self._responses))

    async def read_all(self) -> None:
        """Read to the end."""
        async with asyncio.timeout(PATIENCE_S):
            async for response in self._responses:
                self._add(response)

    async def fails(self, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
        """Read to the end, which must be the failure `code`."""
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await self.read_all()
        assert failure.value.code() is code, failure.value.details()
        return failure.value

    def cancel(self) -> None:
        self._call.cancel()

    def _add(self, response: pb.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "started":
                assert self.started is None
                self.started = response.started
            case "delta":
                assert self.started is not None
                self.text += response.delta.text
                self.tokens.extend(response.delta.tokens)
            case "finished":
                assert self._finished is None
                self._finished = response.finished


async def collect(call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]") -> Reading:
    """Read a stream to its good end."""
    reading = Reading(call)
    await reading.read_all()
    return reading


async def fails(
    call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]", code: grpc.StatusCode
) -> grpc.aio.AioRpcError:
    """Read a stream that must fail with `code`."""
    return await Reading(call).fails(code)


def refusal_of(error: grpc.aio.AioRpcError) -> tuple[str, float]:
    """Return the reason of a failed call, and after how long it may be tried again (0: it does not say)."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    reason, retry_after_s = "", 0.0
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, retry_after_s
