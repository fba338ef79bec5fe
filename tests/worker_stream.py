"""A gateway's stream to one real worker, which does what a test tells it and keeps every report."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from core.ids import Epoch
from core.request import RequestOutput
from core.rpc import connect
from protos import codec, worker_pb2, worker_pb2_grpc
from tests.worker_side import PATIENCE_S

EPOCH = Epoch(3)

_Report = worker_pb2.PrefillReport | worker_pb2.DecodeReport


class WorkerStream:
    """A gateway's stream to one worker: sends commands, keeps every report, lets a test wait for one."""

    def __init__(self, address: str, stub: type, command: type, epoch: int = EPOCH) -> None:
        self._channel = connect(address)
        self._stub: Any = stub(self._channel)
        self._command: Any = command
        self._epoch = epoch
        self.reports: list[_Report] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.is_over = False
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> "WorkerStream":
        self._call = self._stub.Connect()
        self._reading = asyncio.create_task(self._read())
        await self.send(hello=worker_pb2.Hello(gateway_id="g", worker_epoch=self._epoch))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cut()
        await self._channel.close()

    async def cut(self) -> None:
        """End the stream as a gateway that dies does."""
        self._call.cancel()
        await self._reading

    async def send(self, **command: object) -> None:
        # gRPC takes one write at a time. A stream that is over takes none, and `error` tells why.
        async with self._writing:
            if not self._call.done():
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._call.write(self._command(**command))

    async def abort(self, request_id: str) -> None:
        await self.send(abort=worker_pb2.WorkAbort(request_id=request_id, reason="the test"))

    async def list_cached_blocks(self) -> worker_pb2.ListCachedBlocksResponse:
        reply: worker_pb2.ListCachedBlocksResponse = await self._stub.ListCachedBlocks(
            worker_pb2.ListCachedBlocksRequest(), timeout=PATIENCE_S
        )
        return reply

    async def list_kv_decisions(self, last: int) -> worker_pb2.ListKvDecisionsResponse:
        reply: worker_pb2.ListKvDecisionsResponse = await self._stub.ListKvDecisions(
            worker_pb2.ListKvDecisionsRequest(last=last), timeout=PATIENCE_S
        )
        return reply

    async def until(self, is_wanted: Callable[[_Report], bool]) -> Any:
        """Return the first report that is wanted, come or to come."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            while True:
                for report in self.reports:
                    if is_wanted(report):
                        return report
                assert not self.is_over, f"the stream is over: {self.error}"
                await self._changed.wait()

    async def answer(self, kind: str, request_id: str) -> Any:
        """Return the report of a kind about a request."""

        def is_it(report: _Report) -> bool:
            return report.WhichOneof("report") == kind and getattr(report, kind).request_id == request_id

        return getattr(await self.until(is_it), kind)

    async def until_over(self) -> grpc.aio.AioRpcError | None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([self._reading])
        return self.error

    def outputs(self, request_id: str) -> list[RequestOutput]:
        return [
            output
            for report in self.reports
            if report.HasField("outputs")
            for output in codec.outputs_from_wire(report.outputs)
            if output.request_id == request_id
        ]

    def kinds(self, request_id: str) -> list[str]:
        """Return what was said about a request, in order."""
        kinds: list[str] = []
        for report in self.reports:
            kind = report.WhichOneof("report") or ""
            if kind == "outputs":
                if any(output.request_id == request_id for output in report.outputs.outputs):
                    kinds.append(kind)
            elif getattr(getattr(report, kind), "request_id", None) == request_id:
                kinds.append(kind)
        return kinds

    async def until_output(self, request_id: str) -> None:
        await self.until(lambda report: any(one.request_id == request_id for one in report.outputs.outputs))

    async def until_finished(self, request_id: str) -> None:
        await self.until(
            lambda report: any(o.request_id == request_id and o.HasField("finish") for o in report.outputs.outputs)
        )

    async def _read(self) -> None:
        try:
            async for report in self._call:
                async with self._changed:
                    self.reports.append(report)
                    self._changed.notify_all()
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            pass  # we cut it
        async with self._changed:
            self.is_over = True
            self._changed.notify_all()


def prefill_stream(address: str, epoch: int = EPOCH) -> WorkerStream:
    return WorkerStream(address, worker_pb2_grpc.PrefillWorkerStub, worker_pb2.PrefillCommand, epoch)


def decode_stream(address: str, epoch: int = EPOCH) -> WorkerStream:
    return WorkerStream(address, worker_pb2_grpc.DecodeWorkerStub, worker_pb2.DecodeCommand, epoch)
