"""The control plane over gRPC: messages and errors in, messages and errors out, nothing decided here."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from core.rpc import connect, from_rpc_error, reply_errors
from core.tls import ClientTls, PeerTls
from kv_transfer.ports import Peer
from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from kv_transfer.receiver.receiver import KvReceiver

_log = logging.getLogger(__name__)
_FAREWELL_S = 1.0  # how long a closing stream waits for what was said last to leave


class GrpcDialer:
    """Control streams over gRPC channels, one channel per stream.

    Args:
        tls: how to be sure of peers, and what to show them; None: no TLS.
    """

    def __init__(self, tls: PeerTls | None = None) -> None:
        self._tls = tls.client if tls is not None else None

    def dial(self, peer: Peer) -> "GrpcControlStream":
        return GrpcControlStream(peer, self._tls)


class GrpcControlStream:
    """The sender's end of one Control call."""

    def __init__(self, peer: Peer, tls: ClientTls | None = None) -> None:
        self._peer = peer
        self._outbox: asyncio.Queue[pb.SenderMessage | None] = asyncio.Queue()
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._call: grpc.aio.StreamStreamCall[pb.SenderMessage, pb.ReceiverMessage] | None = None

    def send(self, message: pb.SenderMessage) -> None:
        self._outbox.put_nowait(message)

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        self._channel = connect(self._peer.address, self._tls)
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
        if self._channel is not None:
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
        outbox: asyncio.Queue[pb.ReceiverMessage | None] = asyncio.Queue()

        async def write() -> None:
            while (message := await outbox.get()) is not None:
                await context.write(message)

        async with reply_errors(context):
            writer = asyncio.create_task(write())
            writer.add_done_callback(_tell_failure)  # also when gRPC cancels us while we say farewell
            serving = asyncio.ensure_future(self._receiver.serve(request_iterator, outbox.put_nowait))
            try:
                # A writer that failed ends the stream: a peer that hears nothing more has to notice.
                await asyncio.wait([serving, writer], return_when=asyncio.FIRST_COMPLETED)
            finally:
                serving.cancel()
                try:
                    await asyncio.wait([serving])
                finally:
                    outbox.put_nowait(None)
                    await _finish(writer)
            if not serving.cancelled():
                serving.result()


async def _finish(writer: asyncio.Task[None]) -> None:
    """Let what was said last leave, but do not wait long for a peer that does not take it."""
    await asyncio.wait([writer], timeout=_FAREWELL_S)
    writer.cancel()


def _tell_failure(writer: asyncio.Task[None]) -> None:
    if not writer.cancelled() and (error := writer.exception()) is not None:
        _log.info("a control stream ended before everything was said: %s: %s", type(error).__name__, error)


def add_kv_transfer(receiver: "KvReceiver", server: grpc.aio.Server) -> None:
    """Add the receiver's service to a server that has not started yet."""
    pb_grpc.add_KvTransferServicer_to_server(KvTransferService(receiver), server)
