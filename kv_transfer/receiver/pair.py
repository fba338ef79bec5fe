"""The receiver's side of one pair: what one prefill worker may say, and the thread that lands its frames."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Protocol

from core.errors import ProtocolError
from core.ids import TransferId
from kv_transfer.control import ControlReply, nack_reason
from kv_transfer.link import LinkPlan, PairIdentity
from kv_transfer.receiver import events
from kv_transfer.receiver.landing import FrameStamp, Landing, LandingZone
from kv_transfer.receiver.parts import ReceiverParts
from kv_transfer.receiver.pump import ReceivePump
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb

_log = logging.getLogger(__name__)
_MAX_PROFILE_CHARS = 64
_MAX_DYING_LINKS = 64  # each has a thread until it is opened in vain, or its last frames are decoded


class ReceiverPairOwner(Protocol):
    """Told on the event loop."""

    def on_offer(self, pair: "ReceiverPair", offer: pb.Offer) -> None: ...

    def feed_from(self, pair: "ReceiverPair", transfer_id: TransferId, event: events.ReceiverEvent) -> None:
        """An event that this pair's peer or thread caused."""
        ...

    def on_link_lost(self, pair: "ReceiverPair", detail: str) -> None: ...


class ReceiverPair:
    """One prefill worker as the receiver sees it, for as long as its control stream lasts. Event loop only."""

    def __init__(
        self, hello: pb.SenderHello, parts: ReceiverParts, reply: ControlReply, owner: ReceiverPairOwner
    ) -> None:
        self.sender_id = hello.worker_id
        self.sender_epoch = hello.epoch
        self.say = reply
        self.landings: dict[TransferId, Landing] = {}
        self._parts = parts
        identity = parts.identity
        self._names = PairIdentity(hello.worker_id, hello.epoch, identity.worker_id, identity.epoch)
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._pump: ReceivePump | None = None
        self._link_epoch = 0
        self._dying_pumps: list[ReceivePump] = []
        self._is_progress_posted = False

    def hear(self, message: pb.SenderMessage) -> None:
        """Take one message of the control stream.

        Raises:
            ProtocolError: it has no place in this protocol; the stream should end.
        """
        match message.WhichOneof("message"):
            case "open_link":
                self._open_link(message.open_link.link_epoch)
            case "offer":
                self._owner.on_offer(self, message.offer)
            case "commit":
                commit = message.commit
                if not 0.0 <= commit.waited_s < math.inf:
                    raise ProtocolError(f"{self.sender_id} said {commit.waited_s} seconds")
                received = events.CommitReceived(
                    commit.num_frames,
                    commit.payload_bytes,
                    commit.first_token_id,
                    commit.profile[:_MAX_PROFILE_CHARS],
                    commit.kept_tokens or None,
                    commit.waited_s,
                )
                self._owner.feed_from(self, TransferId(commit.transfer_id), received)
            case "abort":
                aborted = events.AbortReceived(nack_reason(message.abort.reason))
                self._owner.feed_from(self, TransferId(message.abort.transfer_id), aborted)
            case "renew":
                for transfer_id in message.renew.transfer_ids:
                    self._owner.feed_from(self, TransferId(transfer_id), events.LeaseRenewed())
            case unexpected:
                raise ProtocolError(f"{self.sender_id} said {unexpected or 'nothing that is known here'}")

    def say_ack(self, transfer_id: TransferId, exposed_s: float) -> None:
        """Acknowledge a transfer, and with it what has arrived on the link."""
        ack = pb.Ack(transfer_id=transfer_id, exposed_s=exposed_s, link_epoch=self._link_epoch)
        if self._pump is not None:
            received = self._pump.received
            ack.received_bytes, ack.received_ago_s = received.num_bytes, received.ago_s
        self.say(pb.ReceiverMessage(ack=ack))

    def close_link(self) -> None:
        """Break the link that is open, if any; its thread ends in the background."""
        if self._pump is not None:
            self._pump.close()
            self._dying_pumps = [pump for pump in self._dying_pumps if not pump.finished.done()] + [self._pump]
            self._pump = None

    async def close(self) -> None:
        """Break the link and wait for its threads, within the configured time."""
        self.close_link()
        ending = [asyncio.wrap_future(pump.finished) for pump in self._dying_pumps]
        if not ending:
            return
        # A pump waits as long for its codec jobs, so it is given twice the time.
        _, pending = await asyncio.wait(ending, timeout=2 * self._parts.config.close_timeout_s)
        if pending:  # one is opening a link, or inside the pool, which nothing can interrupt; it ends after that
            _log.warning("%d receiver threads from %s have not ended yet", len(pending), self.sender_id)
        for pump in self._dying_pumps:
            if pump.finished.done():
                pump.join()

    def _open_link(self, link_epoch: int) -> None:
        if link_epoch <= self._link_epoch:
            return  # a duplicate, or older than what is open
        if sum(not pump.finished.done() for pump in self._dying_pumps) >= _MAX_DYING_LINKS:
            raise ProtocolError(f"{self.sender_id} opens links faster than they close")
        self._lost(self._link_epoch, f"the sender went on to link epoch {link_epoch}")
        parts, config = self._parts, self._parts.config
        self._link_epoch = link_epoch
        stamp = FrameStamp(self.sender_epoch, self._names.receiver_epoch, link_epoch)
        zone = LandingZone(stamp, parts.layout, parts.writer, parts.decoders, self.landings)
        plan = LinkPlan(
            self._names.link_name(link_epoch),
            config.slot_bytes,
            config.num_slots,
            config.open_timeout_s,
            config.send_timeout_s,
        )
        opened = pb.LinkOpened(
            link_epoch=link_epoch,
            rendezvous=parts.links.host(),
            slot_bytes=config.slot_bytes,
            backend=parts.links.backend,
        )
        self._pump = ReceivePump(parts, plan, link_epoch, zone, self)
        self._pump.start()
        self.say(pb.ReceiverMessage(link_opened=opened))
        self.say(pb.ReceiverMessage(credit=pb.Credit(bytes=config.credit_bytes, link_epoch=link_epoch)))

    # --- hooks of the pump, on its thread or a codec thread -----------------------------------------------------------

    def on_progress(self) -> None:
        # Frames may land faster than the loop turns: one look at the totals serves all of them.
        if not self._is_progress_posted:
            self._is_progress_posted = True
            self._post(self.look)

    def on_refused(self, transfer_id: TransferId, reason: NackReason, detail: str) -> None:
        self._post(self._owner.feed_from, self, transfer_id, events.FrameWasRefused(reason, detail))

    def on_link_lost(self, link_epoch: int, detail: str) -> None:
        self._post(self._lost, link_epoch, detail)

    # --- the same, arrived on the loop --------------------------------------------------------------------------------

    def look(self) -> None:
        """Tell the sessions what the receiver thread has written."""
        self._is_progress_posted = False
        for landing in list(self.landings.values()):
            written = landing.written
            if written.num_frames > landing.told_frames:
                landing.told_frames = written.num_frames
                self._owner.feed_from(self, landing.transfer_id, written)
        if self._pump is not None and (news := self._pump.take_news()):
            consumed, received = news
            credit = pb.Credit(
                bytes=consumed,
                link_epoch=self._link_epoch,
                received_bytes=received.num_bytes,
                received_ago_s=received.ago_s,
            )
            self.say(pb.ReceiverMessage(credit=credit))

    def _lost(self, link_epoch: int, detail: str) -> None:
        if self._pump is not None and link_epoch == self._link_epoch:
            self.close_link()
            self.look()  # what was written before the end may complete a transfer: its ACK goes first
            self.say(pb.ReceiverMessage(link_lost=pb.LinkLost(link_epoch=link_epoch, detail=detail[:500])))
            self._owner.on_link_lost(self, detail)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(callback, *args)
