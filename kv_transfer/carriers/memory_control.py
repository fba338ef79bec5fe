"""Control streams inside one process, straight into a receiver, in order. For tests and colocated workers."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from core.errors import ServingError, WorkerLost
from kv_transfer.control import ControlStream
from kv_transfer.ports import Peer
from kv_transfer.receiver.receiver import KvReceiver
from protos import kv_transfer_pb2 as pb


class MemoryDialer:
    """Finds receivers by their address; one that nobody has is a peer that is gone."""

    def __init__(self, receivers: Mapping[str, KvReceiver]) -> None:
        self._receivers = receivers

    def dial(self, peer: Peer) -> ControlStream:
        return MemoryStream(self._receivers.get(peer.address))


class MemoryStream:
    """Both queues of one stream. Event loop only."""

    def __init__(self, receiver: KvReceiver | None) -> None:
        self._receiver = receiver
        self._served: asyncio.Task[None] | None = None
        self.to_receiver: asyncio.Queue[pb.SenderMessage | None] = asyncio.Queue()
        self.to_sender: asyncio.Queue[pb.ReceiverMessage | ServingError | None] = asyncio.Queue()

    def send(self, message: pb.SenderMessage) -> None:
        self.to_receiver.put_nowait(message)

    async def messages(self) -> AsyncIterator[pb.ReceiverMessage]:
        if self._receiver is None:
            raise WorkerLost("nobody is at this address")
        self._served = asyncio.create_task(self._serve(self._receiver))
        while (message := await self.to_sender.get()) is not None:
            if isinstance(message, ServingError):
                raise WorkerLost(str(message)) from message
            yield message

    async def close(self) -> None:
        self.to_receiver.put_nowait(None)
        if self._served is not None:
            await asyncio.wait([self._served])

    def break_off(self) -> None:
        """End the stream as a crash would: both sides notice."""
        self.to_receiver.put_nowait(None)
        self.to_sender.put_nowait(None)

    async def _serve(self, receiver: KvReceiver) -> None:
        try:
            await receiver.serve(self._inbound(), self.to_sender.put_nowait)
            self.to_sender.put_nowait(None)
        except ServingError as error:
            self.to_sender.put_nowait(error)

    async def _inbound(self) -> AsyncIterator[pb.SenderMessage]:
        while (message := await self.to_receiver.get()) is not None:
            yield message
