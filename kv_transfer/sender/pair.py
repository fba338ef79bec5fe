"""The sender's side of one pair: its control stream (on the loop) and its pump (a thread), joined."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from core.errors import ProtocolError, ServingError, WorkerLost
from core.ids import TransferId
from kv_transfer.control import ControlStream, nack_reason
from kv_transfer.frame import FRAME_VERSION
from kv_transfer.link import PairIdentity
from kv_transfer.ports import Peer
from kv_transfer.sender import events
from kv_transfer.sender.outgoing import OpenedLink, Outgoing
from kv_transfer.sender.parts import SenderParts
from kv_transfer.sender.pump import SendPump
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb

_log = logging.getLogger(__name__)


class PairOwner(Protocol):
    """Told on the event loop."""

    def feed(self, transfer_id: TransferId, event: events.SenderEvent) -> None: ...

    def on_link_lost(self, pair: "SenderPair", detail: str, is_unreachable: bool) -> None: ...

    def on_receiver_lost_link(self, pair: "SenderPair", link_epoch: int, detail: str) -> None: ...

    def on_link_moved(self, pair: "SenderPair", link_epoch: int, received_bytes: int) -> None:
        """The receiver has taken so much payload from this link."""
        ...

    def on_pair_lost(self, pair: "SenderPair", detail: str) -> None:
        """The stream ended, or never came up. The pair is of no more use."""
        ...


class SenderPair:
    """One decode worker as the sender sees it. Event loop only, but for the pump's hooks."""

    def __init__(self, peer: Peer, parts: SenderParts, stream: ControlStream, owner: PairOwner) -> None:
        """Begin to connect, and start the pump."""
        self.peer = peer
        self.is_up = False
        self._config = parts.config
        self._clock = parts.clock
        self._owner = owner
        self._stream = stream
        self._unsaid: list[pb.SenderMessage] = []
        self._asked: tuple[int, float] | None = None  # link epoch, and when it was asked for
        self._loop = asyncio.get_running_loop()
        identity, layout = parts.identity, parts.layout
        names = PairIdentity(identity.worker_id, identity.epoch, peer.worker_id, peer.epoch)
        self.pump = SendPump(parts, names, self)
        self.pump.start()
        hello = pb.SenderHello(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            receiver_epoch=peer.epoch,
            layout_fingerprint=layout.fingerprint,
            frame_version=FRAME_VERSION,
        )
        self._task = self._loop.create_task(self._listen(hello), name=f"kv-control-{peer.worker_id}")

    def say(self, message: pb.SenderMessage) -> None:
        """Queue a message; those before the hello is answered wait for it."""
        if self.is_up:
            self._stream.send(message)
        else:
            self._unsaid.append(message)

    async def close(self) -> None:
        """End the stream and the thread, within the configured time."""
        self.pump.close()
        await self._stream.close()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        _, pending = await asyncio.wait([asyncio.wrap_future(self.pump.finished)], timeout=self._config.close_timeout_s)
        if pending:  # it is opening a link, or inside the pool, which nothing can interrupt; it ends after that
            _log.warning("the sender thread to %s has not ended yet", self.peer.worker_id)
        else:
            self.pump.join()

    # --- the control stream -------------------------------------------------------------------------------------------

    async def _listen(self, hello: pb.SenderHello) -> None:
        messages = self._stream.messages()
        try:
            self._stream.send(pb.SenderMessage(hello=hello))
            async with asyncio.timeout(self._config.connect_timeout_s):
                await self._greet(messages)
            async for message in messages:
                self._hear(message)
            detail = f"{self.peer.worker_id} ended the control stream"
        except TimeoutError:
            detail = f"{self.peer.worker_id} did not answer within {self._config.connect_timeout_s:g} s"
        except ServingError as error:
            detail = str(error)
        except Exception as error:  # a defect here must not leave transfers waiting for a stream that nobody hears
            _log.exception("control stream to %s", self.peer.worker_id)
            detail = f"{type(error).__name__}: {error}"
        self._owner.on_pair_lost(self, detail)

    async def _greet(self, messages: AsyncIterator[pb.ReceiverMessage]) -> None:
        try:
            first = await anext(messages)
        except StopAsyncIteration:
            raise WorkerLost(f"{self.peer.worker_id} ended the control stream before its hello") from None
        hello = first.hello
        if first.WhichOneof("message") != "hello" or hello.frame_version != FRAME_VERSION:
            raise ProtocolError(f"{self.peer.worker_id} did not answer with a hello of frame version {FRAME_VERSION}")
        if (hello.worker_id, hello.epoch) != (self.peer.worker_id, self.peer.epoch):
            raise WorkerLost(f"{hello.worker_id} epoch {hello.epoch} answers at the address of {self.peer.worker_id}")
        self.is_up = True
        for message in self._unsaid:
            self._stream.send(message)
        self._unsaid.clear()

    def _hear(self, message: pb.ReceiverMessage) -> None:
        match message.WhichOneof("message"):
            case "link_opened":
                opened = message.link_opened
                if self._asked is not None and self._asked[0] == opened.link_epoch:
                    self.pump.link.gauge.exchanged(self._clock.now() - self._asked[1])
                self.pump.link.opened(
                    OpenedLink(opened.link_epoch, opened.rendezvous, opened.slot_bytes, opened.backend)
                )
            case "link_lost":
                lost = message.link_lost
                self.pump.link.distrust(lost.link_epoch)
                self._owner.on_receiver_lost_link(self, lost.link_epoch, lost.detail)
            case "credit":
                self.pump.link.grant(message.credit.bytes)
                self._hear_received(message.credit)
            case "reserved":
                lease_s = self._seconds(message.reserved.lease_s)
                granted = events.ReservationGranted(message.reserved.held_tokens, lease_s)
                self._owner.feed(TransferId(message.reserved.transfer_id), granted)
            case "ack":
                self._hear_received(message.ack)
                acked = events.AckReceived(self._seconds(message.ack.exposed_s))
                self._owner.feed(TransferId(message.ack.transfer_id), acked)
            case "nack":
                nack = message.nack
                received = events.NackReceived(nack_reason(nack.reason), nack.detail)
                self._owner.feed(TransferId(nack.transfer_id), received)
            case unexpected:
                raise ProtocolError(f"{self.peer.worker_id} said {unexpected or 'nothing that is known here'}")

    def _seconds(self, said: float) -> float:
        if not 0.0 <= said < math.inf:
            raise ProtocolError(f"{self.peer.worker_id} said {said} seconds")
        return said

    def _hear_received(self, news: pb.Credit | pb.Ack) -> None:
        self.pump.link.gauge.arrived(news.link_epoch, news.received_bytes, news.received_ago_s)
        self._owner.on_link_moved(self, news.link_epoch, news.received_bytes)

    # --- hooks of the pump, on its thread -----------------------------------------------------------------------------

    def on_first_frame(self, outgoing: Outgoing) -> None:
        self._post(self._owner.feed, outgoing.transfer_id, events.FrameSent())

    def on_all_sent(self, outgoing: Outgoing, first_token_id: int) -> None:
        sent = events.AllSent(outgoing.num_frames, outgoing.payload_bytes, first_token_id)
        self._post(self._owner.feed, outgoing.transfer_id, sent)

    def on_failed(self, outgoing: Outgoing, reason: NackReason, detail: str) -> None:
        self._post(self._owner.feed, outgoing.transfer_id, events.Aborted(reason, detail))

    def on_link_lost(self, detail: str, *, is_unreachable: bool) -> None:
        self._post(self._owner.on_link_lost, self, detail, is_unreachable)

    def on_link_needed(self, link_epoch: int) -> None:
        self._post(self._ask_for_link, link_epoch)

    def _ask_for_link(self, link_epoch: int) -> None:
        if self.is_up:  # else the answer would take as long as the greeting
            self._asked = (link_epoch, self._clock.now())
        self.say(pb.SenderMessage(open_link=pb.OpenLink(link_epoch=link_epoch)))

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(callback, *args)
