"""Who may speak to a receiver: control streams, one per prefill worker, admitted by epoch and layout.

A worker has one stream. When it comes again, its old stream is dead and this side has not noticed yet; when an older
incarnation comes, it is a zombie. What is said on an admitted stream is its pair's to hear (`pair`).
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable

from core.errors import DeadlineExceeded, ProtocolError, RejectedError, RejectReason
from kv_transfer.control import ControlReply
from kv_transfer.frame import FRAME_VERSION
from kv_transfer.receiver.pair import ReceiverPair, ReceiverPairOwner
from kv_transfer.receiver.parts import ReceiverParts
from protos import kv_transfer_pb2 as pb

_KEPT_EPOCHS = 4096


class ReceiverStreams:
    """All control streams of one receiver. Event loop only."""

    def __init__(
        self, parts: ReceiverParts, owner: ReceiverPairOwner, on_detached: Callable[[ReceiverPair, str], None]
    ) -> None:
        """
        Args:
            owner: of the pairs.
            on_detached: a pair is out of use, and why; its transfers have to end. Once per pair or more often.
        """
        self._parts = parts
        self._owner = owner
        self._on_detached = on_detached
        self._pairs: dict[str, ReceiverPair] = {}
        self._newest_epochs: OrderedDict[str, int] = OrderedDict()
        self._serving: dict[ReceiverPair, asyncio.Task[None]] = {}
        self._streams: set[asyncio.Future[None]] = set()
        self._is_closed = False

    @property
    def pairs(self) -> Iterable[ReceiverPair]:
        return self._pairs.values()

    def refuse(self) -> None:
        """Admit no more streams."""
        self._is_closed = True

    async def close(self) -> None:
        """End all streams; wait for their pairs."""
        self._is_closed = True
        for reader in self._serving.values():
            reader.cancel()
        await asyncio.gather(*self._streams)

    async def serve(self, messages: AsyncIterator[pb.SenderMessage], reply: ControlReply) -> None:
        """Serve one control stream until it ends. Raises as `KvReceiver.serve`."""
        timeout_s = self._parts.config.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                first = await anext(messages, pb.SenderMessage())
        except TimeoutError:
            raise DeadlineExceeded(f"no hello within {timeout_s:g} s") from None
        pair = self._greet(first, reply)
        ended = asyncio.get_running_loop().create_future()
        self._streams.add(ended)
        reader = self._serving[pair] = asyncio.ensure_future(_read(pair, messages))
        try:
            await asyncio.wait([reader])
            if not reader.cancelled():
                await reader
        finally:
            reader.cancel()
            self._detach(pair, f"{pair.sender_id} ended the control stream")
            closing = asyncio.ensure_future(pair.close())
            closing.add_done_callback(lambda _: self._forget_stream(ended))
            await asyncio.shield(closing)  # gRPC cancels us when the peer dies; the pair's threads are still waited for

    def _forget_stream(self, ended: "asyncio.Future[None]") -> None:
        self._streams.discard(ended)
        ended.set_result(None)

    def _greet(self, first: pb.SenderMessage, reply: ControlReply) -> ReceiverPair:
        hello, identity = first.hello, self._parts.identity
        if first.WhichOneof("message") != "hello" or hello.frame_version != FRAME_VERSION:
            raise ProtocolError(f"a control stream begins with a hello of frame version {FRAME_VERSION}")
        if self._is_closed:
            raise RejectedError(RejectReason.DRAINING, "the receiver is closed")
        if hello.receiver_epoch != identity.epoch:
            raise RejectedError(
                RejectReason.STALE_EPOCH, f"epoch {hello.receiver_epoch} was meant, this is {identity.epoch}"
            )
        if hello.layout_fingerprint != self._parts.layout.fingerprint:
            raise RejectedError(RejectReason.INCOMPATIBLE_LAYOUT, "the workers serve different models")
        newest_epoch = self._newest_epochs.get(hello.worker_id, hello.epoch)
        if newest_epoch > hello.epoch:
            raise RejectedError(RejectReason.STALE_EPOCH, f"{hello.worker_id} is at epoch {newest_epoch}")
        self._remember(hello.worker_id, hello.epoch)
        older = self._pairs.get(hello.worker_id)
        if older is not None:
            self._detach(older, f"{hello.worker_id} opened another control stream", is_cancelling=True)
        pair = ReceiverPair(hello, self._parts, reply, self._owner)
        self._pairs[pair.sender_id] = pair
        mine = pb.ReceiverHello(worker_id=identity.worker_id, epoch=identity.epoch, frame_version=FRAME_VERSION)
        reply(pb.ReceiverMessage(hello=mine))
        return pair

    def _remember(self, sender_id: str, epoch: int) -> None:
        """Keep the newest epoch of a sender past the end of its stream: a zombie may come back when it is gone."""
        self._newest_epochs[sender_id] = epoch
        self._newest_epochs.move_to_end(sender_id)
        if len(self._newest_epochs) > _KEPT_EPOCHS:
            self._newest_epochs.popitem(last=False)

    def _detach(self, pair: ReceiverPair, detail: str, *, is_cancelling: bool = False) -> None:
        """Take a pair out of use. Idempotent."""
        if self._pairs.get(pair.sender_id) is pair:
            del self._pairs[pair.sender_id]
        reader = self._serving.pop(pair, None)
        self._on_detached(pair, detail)
        if is_cancelling and reader is not None:
            reader.cancel()


async def _read(pair: ReceiverPair, messages: AsyncIterator[pb.SenderMessage]) -> None:
    async for message in messages:
        pair.hear(message)
