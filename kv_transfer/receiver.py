"""The decode worker's end of all its KV transfers: the shell around `ReceiverSession` and `ReceivePump`.

What happens to one transfer, and on which thread:

1. `expect` (loop): the owner reserved blocks. `serve` (loop, one per prefill worker) hears the offer, before or after.
   With both, the transfer is reserved: frames are let in, and the sender is told what is held here.
2. Frames (receiver thread of the pair): verified, written into the pool, accounted for; the loop is told the totals.
3. Commit (loop). When commit, frames and reservation agree, it has landed: ACK is said and the owner is told.
4. Any failure: the gate of the transfer is closed, NACK is said; when no write is inside, the owner is told.

Sessions that ended are kept for a while, so that messages that come late or twice get the same answer.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    InvalidTransition,
    ProtocolError,
    RejectedError,
    RejectReason,
    TransferError,
)
from core.ids import RequestId, TransferId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer import receiver_events as session
from kv_transfer.box import Box
from kv_transfer.codec import Decoder, default_decoders
from kv_transfer.config import KvTransferConfig
from kv_transfer.control import ControlReply, nack
from kv_transfer.coverage import Coverage
from kv_transfer.deadline_timer import DeadlineTimer
from kv_transfer.frame import FRAME_VERSION
from kv_transfer.landing import Landing
from kv_transfer.link import Links
from kv_transfer.links import open_links
from kv_transfer.metrics import KvTransferMetrics, process_metrics
from kv_transfer.ports import KvWriter, LandedStats, ReceiverOutcomes
from kv_transfer.receiver_pair import ReceiverPair
from kv_transfer.receiver_session import ReceiverSession
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb

_log = logging.getLogger(__name__)
_KEPT_ENDED = 4096
_KEPT_EPOCHS = 4096


@dataclass(slots=True, eq=False)
class _Transfer:
    """One live transfer of this receiver. `pair` is None until the offer came, `landing` until it is reserved."""

    session: ReceiverSession
    request_id: RequestId | None = None
    held_tokens: int = 0
    num_tokens: int = 0
    pair: ReceiverPair | None = None
    landing: Landing | None = None
    done: asyncio.Future[None] = field(default_factory=asyncio.Future)


class KvReceiver:
    """One per decode worker. Everything on one event loop."""

    def __init__(
        self,
        config: KvTransferConfig,
        identity: WorkerIdentity,
        layout: KvLayout,
        writer: KvWriter,
        outcomes: ReceiverOutcomes,
        clock: Clock,
        *,
        links: Links | None = None,
        decoders: Mapping[int, Decoder] | None = None,
        metrics: KvTransferMetrics | None = None,
    ) -> None:
        """Nothing is hosted before a sender comes. `rpc.add_kv_transfer` puts it on a server."""
        self._config = config
        self._identity = identity
        self._layout = layout
        self._writer = writer
        self._outcomes = outcomes
        self._clock = clock
        self._links = links or open_links(config)
        self._decoders = decoders or default_decoders()
        self._metrics = metrics or process_metrics()
        self._transfers: dict[TransferId, _Transfer] = {}
        self._ended: OrderedDict[TransferId, ReceiverSession] = OrderedDict()
        self._pairs: dict[str, ReceiverPair] = {}
        self._newest_epochs: OrderedDict[str, int] = OrderedDict()
        self._serving: dict[ReceiverPair, asyncio.Task[None]] = {}
        self._streams: set[asyncio.Future[None]] = set()
        self._timer = DeadlineTimer(clock, self.tick)
        self._is_closed = False

    # --- the owner's side ---------------------------------------------------------------------------------------------

    async def expect(
        self,
        transfer_id: TransferId,
        request_id: RequestId,
        held_tokens: int,
        num_tokens: int,
        lease_s: float | None = None,
    ) -> None:
        """Say that blocks for [held_tokens, num_tokens) are reserved; exactly one outcome will follow.

        Args:
            lease_s: how long nothing need be heard of it, before the offer and between heartbeats.

        Raises:
            DuplicateRequest: it is expected already.
            TransferError: it has ended before (the sender gave up first), or this side is closed. No outcome follows.
        """
        if self._is_closed:
            raise TransferError(NackReason.CLOSED, "the receiver is closed")
        if transfer_id in self._ended:
            raise TransferError(NackReason.CANCELLED, f"{transfer_id} ended as {self._ended[transfer_id].state}")
        expected = session.Expected(
            request_id, held_tokens, num_tokens, self._layout.bytes_per_token, lease_s or self._config.lease_s
        )
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            machine = self._new_session(transfer_id, expected)
            transfer = self._transfers[transfer_id] = _Transfer(machine)
        elif transfer.request_id is not None:
            raise DuplicateRequest(f"transfer {transfer_id} is expected already")
        transfer.request_id = request_id
        transfer.held_tokens, transfer.num_tokens = held_tokens, num_tokens
        if transfer.pair is not None:
            self._feed(transfer, expected)
        self._timer.arm(transfer.session.next_deadline())

    async def cancel(self, transfer_id: TransferId, reason: str) -> None:
        """End a transfer; returns after its outcome was told: no write is in progress or will come.

        Does nothing when it has ended: after it landed, the KV is the owner's.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._feed(transfer, session.Cancelled(NackReason.CANCELLED, reason))
            await asyncio.shield(transfer.done)

    async def close(self) -> None:
        """Fail what is live, end all streams and threads. Idempotent."""
        self._is_closed = True
        for transfer in list(self._transfers.values()):
            self._feed(transfer, session.Cancelled(NackReason.CLOSED, "the receiver is closing"))
        waiting = [transfer.done for transfer in self._transfers.values()]
        for reader in self._serving.values():
            reader.cancel()
        await asyncio.gather(*waiting, *self._streams)
        self._timer.disarm()
        self._links.close()

    def tick(self) -> None:
        """Let pass the deadlines that are due, and arm the timer for the next."""
        for pair in self._pairs.values():
            pair.look()  # frames are a sign of life, and are not told one by one
        now = self._clock.now()
        for transfer in list(self._transfers.values()):
            self._perform(transfer, transfer.session.tick(now))
            self._timer.arm(transfer.session.next_deadline())

    # --- the senders' side --------------------------------------------------------------------------------------------

    async def serve(self, messages: AsyncIterator[pb.SenderMessage], reply: ControlReply) -> None:
        """Serve one control stream until it ends.

        Raises:
            RejectedError: STALE_EPOCH, INCOMPATIBLE_LAYOUT, DRAINING: nothing was kept.
            DeadlineExceeded: the peer did not say who it is.
            ProtocolError: the peer broke the protocol; its transfers failed.
        """
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                first = await anext(messages, pb.SenderMessage())
        except TimeoutError:
            raise DeadlineExceeded(f"no hello within {self._config.connect_timeout_s:g} s") from None
        pair = self._greet(first, reply)
        ended = asyncio.get_running_loop().create_future()
        self._streams.add(ended)
        reader = self._serving[pair] = asyncio.ensure_future(self._read(pair, messages))
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

    async def _read(self, pair: ReceiverPair, messages: AsyncIterator[pb.SenderMessage]) -> None:
        async for message in messages:
            pair.hear(message)

    def _greet(self, first: pb.SenderMessage, reply: ControlReply) -> ReceiverPair:
        hello = first.hello
        if first.WhichOneof("message") != "hello" or hello.frame_version != FRAME_VERSION:
            raise ProtocolError(f"a control stream begins with a hello of frame version {FRAME_VERSION}")
        if self._is_closed:
            raise RejectedError(RejectReason.DRAINING, "the receiver is closed")
        if hello.receiver_epoch != self._identity.epoch:
            raise RejectedError(
                RejectReason.STALE_EPOCH, f"epoch {hello.receiver_epoch} was meant, this is {self._identity.epoch}"
            )
        if hello.layout_fingerprint != self._layout.fingerprint:
            raise RejectedError(RejectReason.INCOMPATIBLE_LAYOUT, "the workers serve different models")
        newest_epoch = self._newest_epochs.get(hello.worker_id, hello.epoch)
        if newest_epoch > hello.epoch:
            raise RejectedError(RejectReason.STALE_EPOCH, f"{hello.worker_id} is at epoch {newest_epoch}")
        self._remember(hello.worker_id, hello.epoch)
        older = self._pairs.get(hello.worker_id)
        if older is not None:
            # The same worker again: its old stream is dead, and this side has not noticed yet.
            self._detach(older, f"{hello.worker_id} opened another control stream")
            self._serving[older].cancel()
        pair = ReceiverPair(
            hello,
            self._identity,
            self._config,
            self._layout,
            self._links,
            self._writer,
            self._decoders,
            reply,
            self._metrics,
            owner=self,
        )
        self._pairs[pair.sender_id] = pair
        mine = pb.ReceiverHello(
            worker_id=self._identity.worker_id, epoch=self._identity.epoch, frame_version=FRAME_VERSION
        )
        reply(pb.ReceiverMessage(hello=mine))
        return pair

    def _remember(self, sender_id: str, epoch: int) -> None:
        """Keep the newest epoch of a sender past the end of its stream: a zombie may come back when it is gone."""
        self._newest_epochs[sender_id] = epoch
        self._newest_epochs.move_to_end(sender_id)
        if len(self._newest_epochs) > _KEPT_EPOCHS:
            self._newest_epochs.popitem(last=False)

    def _detach(self, pair: ReceiverPair, detail: str) -> None:
        """Take a pair out of use and fail its transfers. Idempotent."""
        if self._pairs.get(pair.sender_id) is pair:
            del self._pairs[pair.sender_id]
        self._serving.pop(pair, None)
        for transfer in self._of_pair(pair):
            self._feed(transfer, session.StreamLost(detail))

    def on_offer(self, pair: ReceiverPair, offer: pb.Offer) -> None:
        """Bind a transfer to the pair that offers it."""
        transfer_id = TransferId(offer.transfer_id)
        received = session.OfferReceived(RequestId(offer.request_id), offer.num_tokens, offer.bytes_per_token)
        transfer = self._transfers.get(transfer_id)
        if transfer is None and transfer_id not in self._ended:
            strays = sum(1 for other in self._transfers.values() if other.request_id is None)
            if strays >= self._config.max_strays:
                pair.say(nack(transfer_id, NackReason.RECEIVER_FULL, f"{strays} offers wait for a reservation"))
                return
            transfer = self._transfers[transfer_id] = _Transfer(self._new_session(transfer_id, received), pair=pair)
            self._timer.arm(transfer.session.next_deadline())
            return
        if transfer is not None and transfer.pair is None:
            transfer.pair = pair
        self.feed_from(pair, transfer_id, received)

    def feed_from(self, pair: ReceiverPair, transfer_id: TransferId, event: session.ReceiverEvent) -> None:
        """Feed an event that a pair caused, if the transfer is its own."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.pair is pair:
            self._feed(transfer, event)
            return
        is_question = isinstance(event, session.OfferReceived | session.CommitReceived)
        ended = self._ended.get(transfer_id)
        if transfer is None and ended is not None:
            for effect in ended.handle(event, self._clock.now()):
                if isinstance(effect, session.SayNack):
                    pair.say(nack(transfer_id, effect.reason, effect.detail))
                elif isinstance(effect, session.SayAck):
                    pair.say(pb.ReceiverMessage(ack=pb.Ack(transfer_id=transfer_id)))
        elif transfer is not None and is_question:
            pair.say(nack(transfer_id, NackReason.PROTOCOL, "another worker sends this transfer"))
        elif is_question:
            pair.say(nack(transfer_id, NackReason.UNKNOWN_TRANSFER, "never heard of it"))

    def on_link_lost(self, pair: ReceiverPair, detail: str) -> None:
        for transfer in self._of_pair(pair):
            self._feed(transfer, session.LinkLost(detail))

    def _of_pair(self, pair: ReceiverPair) -> list[_Transfer]:
        return [transfer for transfer in self._transfers.values() if transfer.pair is pair]

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _new_session(self, transfer_id: TransferId, first: session.Expected | session.OfferReceived) -> ReceiverSession:
        return ReceiverSession(transfer_id, first, offer_timeout_s=self._config.offer_timeout_s, now=self._clock.now())

    def _feed(self, transfer: _Transfer, event: session.ReceiverEvent) -> None:
        now = self._clock.now()
        try:
            effects = transfer.session.handle(event, now)
        except InvalidTransition as error:
            _log.warning("transfer %s: %s", transfer.session.transfer_id, error)
            effects = transfer.session.handle(session.Cancelled(NackReason.PROTOCOL, str(error)), now)
        self._perform(transfer, effects)
        self._timer.arm(transfer.session.next_deadline())

    def _perform(self, transfer: _Transfer, effects: list[session.ReceiverEffect]) -> None:
        transfer_id = transfer.session.transfer_id
        for effect in effects:
            match effect:
                case session.SayReserved(held_tokens, lease_s):
                    self._open_gate(transfer)
                    reserved = pb.Reserved(transfer_id=transfer_id, held_tokens=held_tokens, lease_s=lease_s)
                    self._say(transfer, pb.ReceiverMessage(reserved=reserved))
                case session.SayAck(exposed_s):
                    ack = pb.Ack(transfer_id=transfer_id, exposed_s=exposed_s)
                    self._say(transfer, pb.ReceiverMessage(ack=ack))
                    self._feed(transfer, session.AckSaid())
                case session.SayNack(reason, detail):
                    self._say(transfer, nack(transfer_id, reason, detail))
                case session.ReportLanded():
                    self._report_landed(transfer, effect)
                case session.ReportFailed(reason, detail):
                    self._metrics.failures.labels("receiver", reason).inc()
                    self._settle_when_unwritten(transfer, self._outcomes.on_failed, transfer_id, str(reason), detail)
        if transfer.session.state.is_terminal and transfer.request_id is None and transfer_id in self._transfers:
            self._forget(transfer)  # never expected here: there is nobody to tell

    def _say(self, transfer: _Transfer, message: pb.ReceiverMessage) -> None:
        if transfer.pair is not None:
            transfer.pair.say(message)

    def _open_gate(self, transfer: _Transfer) -> None:
        if transfer.landing is not None:
            return  # said again to a sender that asked again
        assert transfer.pair is not None
        assert transfer.request_id is not None
        layout = self._layout
        target = None
        if transfer.held_tokens < transfer.num_tokens:
            tokens = range(transfer.held_tokens, transfer.num_tokens)
            target = Box(range(layout.num_layers), range(layout.num_kv_heads), tokens)
        transfer_id = transfer.session.transfer_id
        transfer.landing = Landing(transfer_id, transfer.request_id, Coverage(target))
        transfer.pair.landings[transfer_id] = transfer.landing

    def _report_landed(self, transfer: _Transfer, landed: session.ReportLanded) -> None:
        stats = LandedStats(
            num_frames=landed.num_frames,
            payload_bytes=landed.payload_bytes,
            held_tokens=transfer.held_tokens,
            transfer_s=landed.transfer_s,
            exposed_s=landed.exposed_s,
        )
        self._metrics.transfers.labels("receiver").inc()
        self._metrics.transfer_seconds.observe(landed.transfer_s)
        self._metrics.exposed_seconds.observe(landed.exposed_s)
        transfer_id = transfer.session.transfer_id
        self._settle_when_unwritten(transfer, self._outcomes.on_landed, transfer_id, landed.first_token_id, stats)

    def _settle_when_unwritten(self, transfer: _Transfer, tell: Callable[..., None], *args: object) -> None:
        """Close the gate; when no write is inside, forget the transfer and tell its owner."""
        loop = asyncio.get_running_loop()

        def settle() -> None:
            self._forget(transfer)
            tell(*args)

        if transfer.landing is None:
            loop.call_soon(settle)
        else:
            transfer.landing.gate.close(lambda: loop.call_soon_threadsafe(settle))

    def _forget(self, transfer: _Transfer) -> None:
        transfer_id = transfer.session.transfer_id
        del self._transfers[transfer_id]
        if transfer.pair is not None:
            transfer.pair.landings.pop(transfer_id, None)
        self._ended[transfer_id] = transfer.session
        if len(self._ended) > _KEPT_ENDED:
            self._ended.popitem(last=False)
        transfer.done.set_result(None)
