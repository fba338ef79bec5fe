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

from core.alarm import Alarm
from core.clock import Clock
from core.errors import DuplicateRequest, InvalidTransition, TransferError
from core.ids import RequestId, TransferId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.box import Box
from kv_transfer.carriers.links import open_links
from kv_transfer.codec import Decoder, default_decoders
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.config import KvTransferConfig
from kv_transfer.control import ControlReply, nack
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import Links
from kv_transfer.metrics import KvTransferMetrics, process_metrics
from kv_transfer.ports import KvWriter, LandedStats, ReceiverOutcomes
from kv_transfer.receiver import events
from kv_transfer.receiver.coverage import Coverage
from kv_transfer.receiver.landing import Landing
from kv_transfer.receiver.pair import ReceiverPair
from kv_transfer.receiver.parts import ReceiverParts
from kv_transfer.receiver.session import ReceiverSession
from kv_transfer.receiver.streams import ReceiverStreams
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb

_log = logging.getLogger(__name__)
_KEPT_ENDED = 4096


@dataclass(slots=True, eq=False)
class _Transfer:
    """One live transfer of this receiver. `pair` is None until the offer came, `landing` until it is reserved."""

    session: ReceiverSession
    request_id: RequestId | None = None
    held_tokens: int = 0
    num_tokens: int = 0
    heads: range | None = None
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
        self._layout = layout
        self._outcomes = outcomes
        self._clock = clock
        self._links = links or open_links(config)
        self._metrics = metrics or process_metrics()
        self._threads = CodecThreads(config.codec_threads, identity.worker_id)
        self._parts = ReceiverParts(
            identity=identity,
            config=config,
            layout=layout,
            links=self._links,
            writer=writer,
            decoders=decoders or default_decoders(),
            metrics=self._metrics,
            clock=clock,
            threads=self._threads,
            buffers=Buffers(),
        )
        self._streams = ReceiverStreams(self._parts, owner=self, on_detached=self._on_detached)
        self._transfers: dict[TransferId, _Transfer] = {}
        self._ended: OrderedDict[TransferId, ReceiverSession] = OrderedDict()
        self._timer = Alarm(clock, self.tick)
        self._is_closed = False

    # --- the owner's side ---------------------------------------------------------------------------------------------

    async def expect(
        self,
        transfer_id: TransferId,
        request_id: RequestId,
        held_tokens: int,
        num_tokens: int,
        lease_s: float | None = None,
        heads: range | None = None,
    ) -> None:
        """Say that blocks for [held_tokens, num_tokens) are reserved; exactly one outcome will follow.

        Args:
            lease_s: how long nothing need be heard of it, before the offer and between heartbeats.
            heads: of a shard: this transfer brings these heads only (`kv_transfer.shards`); None: all.

        Raises:
            DuplicateRequest: it is expected already.
            TransferError: it has ended before (the sender gave up first), or this side is closed. No outcome follows.
        """
        if self._is_closed:
            raise TransferError(NackReason.CLOSED, "the receiver is closed")
        if transfer_id in self._ended:
            raise TransferError(NackReason.CANCELLED, f"{transfer_id} ended as {self._ended[transfer_id].state}")
        expected = events.Expected(
            request_id,
            held_tokens,
            num_tokens,
            self._layout.bytes_per_token,
            lease_s or self._config.lease_s,
            self._shard(heads),
        )
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            machine = self._new_session(transfer_id, expected)
            transfer = self._transfers[transfer_id] = _Transfer(machine)
        elif transfer.request_id is not None:
            raise DuplicateRequest(f"transfer {transfer_id} is expected already")
        transfer.request_id = request_id
        transfer.held_tokens, transfer.num_tokens, transfer.heads = held_tokens, num_tokens, expected.heads
        if transfer.pair is not None:
            self._feed(transfer, expected)
        self._timer.arm_by(transfer.session.next_deadline())

    async def cancel(self, transfer_id: TransferId, reason: str) -> None:
        """End a transfer; returns after its outcome was told: no write is in progress or will come.

        Does nothing when it has ended: after it landed, the KV is the owner's.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._feed(transfer, events.Cancelled(NackReason.CANCELLED, reason))
            await asyncio.shield(transfer.done)

    async def close(self) -> None:
        """Fail what is live, end all streams and threads. Idempotent."""
        self._is_closed = True
        self._streams.refuse()
        for transfer in list(self._transfers.values()):
            self._feed(transfer, events.Cancelled(NackReason.CLOSED, "the receiver is closing"))
        waiting = [transfer.done for transfer in self._transfers.values()]
        await asyncio.gather(*waiting, self._streams.close())
        if not await asyncio.to_thread(self._threads.close, self._config.close_timeout_s):
            _log.warning("a decoder has not ended yet")
        self._timer.disarm()
        self._links.close()

    def tick(self) -> None:
        """Let pass the deadlines that are due, and arm the timer for the next."""
        for pair in self._streams.pairs:
            pair.look()  # frames are a sign of life, and are not told one by one
        now = self._clock.now()
        for transfer in list(self._transfers.values()):
            self._perform(transfer, transfer.session.tick(now))
            self._timer.arm_by(transfer.session.next_deadline())

    # --- the senders' side --------------------------------------------------------------------------------------------

    async def serve(self, messages: AsyncIterator[pb.SenderMessage], reply: ControlReply) -> None:
        """Serve one control stream until it ends.

        Raises:
            RejectedError: STALE_EPOCH, INCOMPATIBLE_LAYOUT, DRAINING: nothing was kept.
            DeadlineExceeded: the peer did not say who it is.
            ProtocolError: the peer broke the protocol; its transfers failed.
        """
        await self._streams.serve(messages, reply)

    def _on_detached(self, pair: ReceiverPair, detail: str) -> None:
        for transfer in self._of_pair(pair):
            self._feed(transfer, events.StreamLost(detail))

    def on_offer(self, pair: ReceiverPair, offer: pb.Offer) -> None:
        """Bind a transfer to the pair that offers it."""
        transfer_id = TransferId(offer.transfer_id)
        received = events.OfferReceived(
            RequestId(offer.request_id),
            offer.num_tokens,
            offer.bytes_per_token,
            self._shard(range(offer.first_head, offer.last_head)),
        )
        transfer = self._transfers.get(transfer_id)
        if transfer is None and transfer_id not in self._ended:
            strays = sum(1 for other in self._transfers.values() if other.request_id is None)
            if strays >= self._config.max_strays:
                pair.say(nack(transfer_id, NackReason.RECEIVER_FULL, f"{strays} offers wait for a reservation"))
                return
            transfer = self._transfers[transfer_id] = _Transfer(self._new_session(transfer_id, received), pair=pair)
            self._timer.arm_by(transfer.session.next_deadline())
            return
        if transfer is not None and transfer.pair is None:
            transfer.pair = pair
        self.feed_from(pair, transfer_id, received)

    def feed_from(self, pair: ReceiverPair, transfer_id: TransferId, event: events.ReceiverEvent) -> None:
        """Feed an event that a pair caused, if the transfer is its own."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.pair is pair:
            self._feed(transfer, event)
            return
        is_question = isinstance(event, events.OfferReceived | events.CommitReceived)
        ended = self._ended.get(transfer_id)
        if transfer is None and ended is not None:
            for effect in ended.handle(event, self._clock.now()):
                if isinstance(effect, events.SayNack):
                    pair.say(nack(transfer_id, effect.reason, effect.detail))
                elif isinstance(effect, events.SayAck):
                    pair.say_ack(transfer_id, effect.exposed_s)
        elif transfer is not None and is_question:
            pair.say(nack(transfer_id, NackReason.PROTOCOL, "another worker sends this transfer"))
        elif is_question:
            pair.say(nack(transfer_id, NackReason.UNKNOWN_TRANSFER, "never heard of it"))

    def on_link_lost(self, pair: ReceiverPair, detail: str) -> None:
        for transfer in self._of_pair(pair):
            self._feed(transfer, events.LinkLost(detail))

    def _of_pair(self, pair: ReceiverPair) -> list[_Transfer]:
        return [transfer for transfer in self._transfers.values() if transfer.pair is pair]

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _new_session(self, transfer_id: TransferId, first: events.Expected | events.OfferReceived) -> ReceiverSession:
        return ReceiverSession(transfer_id, first, offer_timeout_s=self._config.offer_timeout_s, now=self._clock.now())

    def _feed(self, transfer: _Transfer, event: events.ReceiverEvent) -> None:
        now = self._clock.now()
        try:
            effects = transfer.session.handle(event, now)
        except InvalidTransition as error:
            _log.warning("transfer %s: %s", transfer.session.transfer_id, error)
            effects = transfer.session.handle(events.Cancelled(NackReason.PROTOCOL, str(error)), now)
        self._perform(transfer, effects)
        self._timer.arm_by(transfer.session.next_deadline())

    def _perform(self, transfer: _Transfer, effects: list[events.ReceiverEffect]) -> None:
        transfer_id = transfer.session.transfer_id
        for effect in effects:
            match effect:
                case events.SayReserved(held_tokens, lease_s):
                    self._open_gate(transfer)
                    reserved = pb.Reserved(transfer_id=transfer_id, held_tokens=held_tokens, lease_s=lease_s)
                    self._say(transfer, pb.ReceiverMessage(reserved=reserved))
                case events.SayAck(exposed_s):
                    if transfer.pair is not None:
                        transfer.pair.say_ack(transfer_id, exposed_s)
                    self._feed(transfer, events.AckSaid())
                case events.SayNack(reason, detail):
                    self._say(transfer, nack(transfer_id, reason, detail))
                case events.NeedOnly(kept_tokens):
                    assert transfer.landing is not None
                    written = transfer.landing.narrow(kept_tokens)
                    if written.num_frames:
                        self._feed(transfer, written)
                case events.ReportLanded():
                    self._report_landed(transfer, effect)
                case events.ReportFailed(reason, detail):
                    self._metrics.failures.labels("receiver", reason).inc()
                    self._settle_when_unwritten(transfer, self._outcomes.on_failed, transfer_id, str(reason), detail)
        if transfer.session.state.is_terminal and transfer.request_id is None and transfer_id in self._transfers:
            self._forget(transfer)  # never expected here: there is nobody to tell

    def _say(self, transfer: _Transfer, message: pb.ReceiverMessage) -> None:
        if transfer.pair is not None:
            transfer.pair.say(message)

    def _shard(self, heads: range | None) -> range | None:
        """Return a proper part of the heads; None when it is all of them, however that was said. Pure."""
        return None if not heads or heads == range(self._layout.num_kv_heads) else heads

    def _open_gate(self, transfer: _Transfer) -> None:
        if transfer.landing is not None:
            return  # said again to a sender that asked again
        assert transfer.pair is not None
        assert transfer.request_id is not None
        layout = self._layout
        target = None
        if transfer.held_tokens < transfer.num_tokens:
            tokens = range(transfer.held_tokens, transfer.num_tokens)
            target = Box(range(layout.num_layers), transfer.heads or range(layout.num_kv_heads), tokens)
        transfer_id = transfer.session.transfer_id
        transfer.landing = Landing(transfer_id, transfer.request_id, Coverage(target))
        transfer.pair.landings[transfer_id] = transfer.landing

    def _report_landed(self, transfer: _Transfer, landed: events.ReportLanded) -> None:
        written = landed.written
        sent_tokens = transfer.num_tokens - transfer.held_tokens
        dropped_tokens = 0 if landed.kept_tokens is None else sent_tokens - landed.kept_tokens
        stats = LandedStats(
            num_frames=written.num_frames,
            raw_bytes=written.raw_bytes,
            held_tokens=transfer.held_tokens,
            transfer_s=landed.transfer_s,
            exposed_s=landed.exposed_s,
            wire_bytes=written.payload_bytes + written.num_frames * HEADER_BYTES,
            profile=landed.profile,
            profile_is_lossless=written.is_exact and dropped_tokens == 0,
            dropped_tokens=dropped_tokens,
        )
        self._metrics.raw_bytes.labels("receiver").inc(written.raw_bytes)
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
