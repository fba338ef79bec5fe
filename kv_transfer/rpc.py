"""The control plane over gRPC: messages and errors in, messages and errors out, nothing decided here."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from core.rpc import connect, from_rpc_error, reply_errors
from kv_transfer.ports import Peer
from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from kv_transfer.receiver import KvReceiver

_FAREWELL_S = 1.0  # how long a closing stream waits for what was said last to leave


class GrpcDialer:
    """Control streams over gRPC channels, one channel per stream."""

    def dial(self, peer: Peer) -> "GrpcControlStream":
        return GrpcControlStream(peer)


class GrpcControlStream:
    """The sender's end of one Control call."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._outbox: asyncio.Queue[pb.SenderMessage | None] = asyncio.Queue()
        self._channel = connect(peer.address)
        self._call: grpc.aio.StreamStreamCall[pb.SenderMessage, pb.ReceiverMessage] | None = None

    def send(self, message: pb.SenderMessage) -> None:
        self._outbox.put_nowait(message)

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        stub: pb_grpc.KvTransferAsyncStub = pb_grpc.KvTransferStub(self._channel)
        self._call = call = stub.Control(self._requests())
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, str(self._peer.worker_id)) from error

    async def _requests(self) -> AsyncIterator[pb.SenderMessage]:
        while (message := await self._outbox.get()) is not None:
            yield message

    async def close(self) -> None:
        self._outbox.put_nowait(None)
        if self._call is not None:
            await asyncio.wait([asyncio.ensure_future(self._call.code())], timeout=_FAREWELL_S)
            self._call.cancel()
        await self._channel.close()


class KvTransferService(pb_grpc.KvTransferServicer):
    """The receiver's end: one handler per control stream."""

    def __init__(self, receiver: "KvReceiver") -> None:
        self._receiver = receiver

    async def Control(  # type: ignore[override]  # noqa: N802  # the stubs know async servicers only as unions
        self,
        request_iterator: AsyncIterator[pb.SenderMessage],
        context: grpc.aio.ServicerContext[pb.SenderMessage, pb.ReceiverMessage],
    ) -> None:
        outbox: asyncio.Queue[pb.ReceiverMessage] = asyncio.Queue()

        async def write() -> None:
            while True:
                await context.write(await outbox.get())

        writer = asyncio.create_task(write())
        try:
            async with reply_errors(context):
                await self._receiver.serve(request_iterator, outbox.put_nowait)
        finally:
            writer.cancel()


def add_kv_transfer(receiver: "KvReceiver", server: grpc.aio.Server) -> None:
    """Add the receiver's service to a server that has not started yet."""
    pb_grpc.add_KvTransferServicer_to_server(KvTransferService(receiver), server)
