"""The prefill worker's end of all its KV transfers: the shell around `SenderSession` and `SendPump`.

What happens to one transfer, and on which thread:

1. `offer` (loop): a session is made; the pair to the decode worker is made if there is none: a control stream, and a
   pump thread whose link opens with the first frame. The offer is said.
2. `push` (engine thread): parts that are in the pool are queued at the pump.
3. Reserved (loop): the pump may begin; it gathers, seals and sends while later parts are being computed.
4. `commit` (any thread): behind the last part in the queue; when the pump gets there, the commit is said.
5. Ack or Nack (loop): the gate of the transfer is closed; when no read is inside, the owner is told the outcome.

A pair lives as long as its control stream. When that ends, everything of the pair that is not acknowledged fails.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from core.alarm import Alarm
from core.clock import Clock
from core.errors import DuplicateRequest, InvalidTransition, TransferError
from core.ids import RequestId, TransferId, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.box import Box
from kv_transfer.carriers.links import open_links
from kv_transfer.choice import NO_TERMS, AlwaysRaw, LinkView, ProfileChooser, TransferQuestion, TransferTerms
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.config import KvTransferConfig
from kv_transfer.control import Dialer
from kv_transfer.link import Links
from kv_transfer.metrics import KvTransferMetrics, process_metrics
from kv_transfer.ports import KvReader, Peer, PeerDown, SenderOutcomes, TokenReader
from kv_transfer.rpc import GrpcDialer
from kv_transfer.sender import events
from kv_transfer.sender.link_quota import LinkQuota
from kv_transfer.sender.outgoing import Commit, Outgoing
from kv_transfer.sender.pair import SenderPair
from kv_transfer.sender.parts import SenderParts
from kv_transfer.sender.peer_health import PeerHealth
from kv_transfer.sender.profile_desk import ProfileDesk
from kv_transfer.sender.session import SenderSession
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb

_log = logging.getLogger(__name__)
_KEPT_HEALTH = 4096


@dataclass(slots=True, eq=False)
class _Transfer:
    """One live transfer of this sender."""

    session: SenderSession
    outgoing: Outgoing
    pair: SenderPair
    terms: TransferTerms
    profile: str = "none"
    committed_at: float | None = None
    done: asyncio.Future[None] = field(default_factory=asyncio.Future)


class KvSender:
    """One per prefill worker. `push` and `commit` from any thread, everything else on one event loop."""

    def __init__(
        self,
        config: KvTransferConfig,
        identity: WorkerIdentity,
        layout: KvLayout,
        reader: KvReader,
        outcomes: SenderOutcomes,
        clock: Clock,
        *,
        chooser: ProfileChooser | None = None,
        tokens: TokenReader | None = None,
        links: Links | None = None,
        dialer: Dialer | None = None,
        metrics: KvTransferMetrics | None = None,
    ) -> None:
        """Nothing is opened before the first offer.

        Args:
            chooser: of the profile of each transfer; None: all go raw.
            tokens: what a profile that leaves tokens out goes by; None: it leaves none out.
            links, dialer, metrics: replace parts, mostly for tests.
        """
        self._config = config
        self._layout = layout
        self._outcomes = outcomes
        self._clock = clock
        self._links = links or open_links(config)
        self._dialer = dialer or GrpcDialer()
        self._metrics = metrics or process_metrics()
        self._profiles = ProfileDesk(chooser or AlwaysRaw(), clock, self._metrics)
        self._threads = CodecThreads(config.codec_threads, identity.worker_id)
        self._quota = LinkQuota(config.max_links)
        self._parts = SenderParts(
            identity=identity,
            config=config,
            layout=layout,
            links=self._links,
            reader=reader,
            tokens=tokens,
            metrics=self._metrics,
            clock=clock,
            threads=self._threads,
            buffers=Buffers(),
            quota=self._quota,
        )
        self._health: OrderedDict[Peer, PeerHealth] = OrderedDict()
        self._transfers: dict[TransferId, _Transfer] = {}
        self._pairs: dict[WorkerId, SenderPair] = {}
        self._closing_pairs: set[asyncio.Task[None]] = set()
        self._timer = Alarm(clock, self.tick)
        self._all_heads = range(layout.num_kv_heads)
        self._is_closed = False

    # --- the owner's side ---------------------------------------------------------------------------------------------

    async def offer(
        self,
        transfer_id: TransferId,
        request_id: RequestId,
        num_tokens: int,
        peer: Peer,
        terms: TransferTerms = NO_TERMS,
        heads: range | None = None,
    ) -> None:
        """Begin a transfer of the KV of [0, num_tokens); exactly one outcome will follow. Does not wait for the peer.

        Args:
            terms: what the profile is chosen by.
            heads: of a shard: only these are brought, under an id of its own (`kv_transfer.shards`); None: all.

        Raises:
            DuplicateRequest: the transfer is live already.
            TransferError: CLOSED, or EPOCH: a newer incarnation of the peer is known.
            PeerDown: it could not be reached a moment ago.
        """
        if self._is_closed:
            raise TransferError(NackReason.CLOSED, "the sender is closed")
        if transfer_id in self._transfers:
            raise DuplicateRequest(f"transfer {transfer_id} is in progress")
        now = self._clock.now()
        self._check_health(peer, now)
        pair = self._pair_to(peer)
        machine = SenderSession(transfer_id, offer_timeout_s=self._config.offer_timeout_s, now=now)
        outgoing = Outgoing(transfer_id, request_id, num_tokens, heads or self._all_heads)
        self._transfers[transfer_id] = _Transfer(machine, outgoing, pair, terms)
        self._quota.began(peer.worker_id)
        shard = outgoing.heads if outgoing.heads != self._all_heads else range(0)
        pair.say(
            pb.SenderMessage(
                offer=pb.Offer(
                    transfer_id=transfer_id,
                    request_id=request_id,
                    num_tokens=num_tokens,
                    bytes_per_token=self._layout.bytes_per_token,
                    first_head=shard.start,
                    last_head=shard.stop,
                )
            )
        )
        self._timer.arm_by(machine.next_deadline())

    def link_view(self, worker_id: WorkerId) -> LinkView | None:
        """Return the link to a decode worker as it is measured, and what waits for it; None: there is none now."""
        pair = self._pairs.get(worker_id)
        return None if pair is None else self._view(pair)

    def push(self, transfer_id: TransferId, layers: range, tokens: range) -> None:
        """Queue a part that is in the pool. Any thread; never blocks; ignored when the transfer has ended."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            transfer.pair.pump.push(transfer.outgoing, Box(layers, transfer.outgoing.heads, tokens))

    def commit(self, transfer_id: TransferId, first_token_id: int) -> None:
        """Say that every part was pushed. Any thread; never blocks; ignored when the transfer has ended."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            transfer.committed_at = self._clock.now()
            transfer.pair.pump.push(transfer.outgoing, Commit(first_token_id))

    async def abort(self, transfer_id: TransferId, reason: str) -> None:
        """End a transfer; returns after its outcome was told. Does nothing when it has ended."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self.feed(transfer_id, events.Aborted(NackReason.CANCELLED, reason))
            await asyncio.shield(transfer.done)

    async def close(self) -> None:
        """Fail what is live, end all threads and streams. Idempotent."""
        self._is_closed = True
        for transfer_id in list(self._transfers):
            self.feed(transfer_id, events.Aborted(NackReason.CLOSED, "the sender is closing"))
        waiting = [transfer.done for transfer in self._transfers.values()]
        for pair in list(self._pairs.values()):
            self._retire(pair)
        await asyncio.gather(*waiting, *self._closing_pairs)
        if not await asyncio.to_thread(self._threads.close, self._config.close_timeout_s):
            _log.warning("an encoder has not ended yet")
        self._timer.disarm()
        self._links.close()

    def tick(self) -> None:
        """Let pass the deadlines that are due, and arm the timer for the next."""
        now = self._clock.now()
        renewals: dict[SenderPair, list[str]] = {}
        for transfer_id, transfer in list(self._transfers.items()):
            for effect in transfer.session.tick(now):
                if isinstance(effect, events.SayRenewal):
                    renewals.setdefault(transfer.pair, []).append(transfer_id)
                else:
                    self._perform(transfer, effect)
            self._timer.arm_by(transfer.session.next_deadline())
        for pair, transfer_ids in renewals.items():
            pair.say(pb.SenderMessage(renew=pb.RenewLeases(transfer_ids=transfer_ids)))

    # --- pairs --------------------------------------------------------------------------------------------------------

    def _pair_to(self, peer: Peer) -> SenderPair:
        pair = self._pairs.get(peer.worker_id)
        if pair is not None and pair.peer != peer:
            if pair.peer.epoch > peer.epoch:
                raise TransferError(NackReason.EPOCH, f"{peer.worker_id} is at epoch {pair.peer.epoch} by now")
            self._retire(pair)
            pair = None
        if pair is None:
            pair = SenderPair(peer, self._parts, self._dialer.dial(peer), owner=self)
            self._pairs[peer.worker_id] = pair
        return pair

    def on_pair_lost(self, pair: SenderPair, detail: str) -> None:
        if not pair.is_up:
            self._note_failure(pair.peer)
        self._retire(pair, detail)

    def _check_health(self, peer: Peer, now: float) -> None:
        health = self._health.get(peer)
        if health is not None and not health.may_try(now):
            raise PeerDown(str(peer.worker_id), health.retry_after_s(now))

    def _note_failure(self, peer: Peer) -> None:
        """It could not be reached. (A stream or a link that was up and broke is tried again at once.)"""
        self._health.setdefault(peer, PeerHealth()).failed(self._clock.now())
        self._health.move_to_end(peer)
        if len(self._health) > _KEPT_HEALTH:
            self._health.popitem(last=False)

    def _retire(self, pair: SenderPair, detail: str = "the pair was closed") -> None:
        """Take a pair out of use, fail its transfers, and end its thread and stream in the background."""
        if self._pairs.get(pair.peer.worker_id) is pair:
            del self._pairs[pair.peer.worker_id]
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.pair is pair:
                self.feed(transfer_id, events.StreamLost(detail))
        task = asyncio.get_running_loop().create_task(pair.close())
        self._closing_pairs.add(task)
        task.add_done_callback(self._closing_pairs.discard)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def on_link_lost(self, pair: SenderPair, detail: str, is_unreachable: bool) -> None:
        if is_unreachable:
            self._note_failure(pair.peer)
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.pair is pair:
                self.feed(transfer_id, events.LinkLost(detail))

    def on_link_moved(self, pair: SenderPair, link_epoch: int, received_bytes: int) -> None:
        for transfer_id, transfer in list(self._transfers.items()):
            outgoing = transfer.outgoing
            is_on_it = outgoing.link_epoch == link_epoch and received_bytes < outgoing.last_link_bytes
            if transfer.pair is pair and is_on_it:
                self.feed(transfer_id, events.LinkMoved())

    def on_receiver_lost_link(self, pair: SenderPair, link_epoch: int, detail: str) -> None:
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.pair is pair and transfer.outgoing.link_epoch == link_epoch:
                self.feed(transfer_id, events.ReceiverLostLink(detail))

    def feed(self, transfer_id: TransferId, event: events.SenderEvent) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return  # settled; what was on its way came late
        now = self._clock.now()
        try:
            effects = transfer.session.handle(event, now)
        except InvalidTransition as error:
            _log.warning("transfer %s: %s", transfer_id, error)
            effects = transfer.session.handle(events.Aborted(NackReason.PROTOCOL, str(error)), now)
        for effect in effects:
            self._perform(transfer, effect)
        self._timer.arm_by(transfer.session.next_deadline())

    def _perform(self, transfer: _Transfer, effect: events.SenderEffect) -> None:
        transfer_id, pair = transfer.session.transfer_id, transfer.pair
        match effect:
            case events.StartSending(held_tokens):
                self._choose_profile(transfer, held_tokens)
                pair.pump.reserve(transfer.outgoing, held_tokens)
            case events.SayCommit(num_frames, payload_bytes, first_token_id):
                kept = transfer.outgoing.kept
                now, ended_at = self._clock.now(), transfer.committed_at
                commit = pb.Commit(
                    transfer_id=transfer_id,
                    num_frames=num_frames,
                    payload_bytes=payload_bytes,
                    first_token_id=first_token_id,
                    profile=transfer.profile,
                    kept_tokens=0 if kept is None else len(kept),
                    waited_s=0.0 if ended_at is None else max(0.0, now - ended_at),
                )
                pair.say(pb.SenderMessage(commit=commit))
            case events.SayAbort(reason):
                pair.say(pb.SenderMessage(abort=pb.AbortTransfer(transfer_id=transfer_id, reason=reason)))
            case events.SayRenewal():
                pair.say(pb.SenderMessage(renew=pb.RenewLeases(transfer_ids=[transfer_id])))
            case events.ReportAcked(exposed_s):
                self._health.pop(pair.peer, None)
                self._observe(transfer, "")
                self._metrics.acked_exposed_seconds.observe(exposed_s)
                self._metrics.transfers.labels("sender").inc()
                self._settle_when_unread(transfer, lambda: self._outcomes.on_acked(transfer_id))
            case events.ReportFailed(reason, detail):
                self._observe(transfer, reason)
                self._metrics.failures.labels("sender", reason).inc()
                self._settle_when_unread(transfer, lambda: self._outcomes.on_failed(transfer_id, str(reason), detail))

    def _choose_profile(self, transfer: _Transfer, held_tokens: int) -> None:
        """Ask how to code what the receiver does not hold; a transfer of nothing is no question."""
        outgoing, config = transfer.outgoing, self._config
        token_bytes = self._layout.bytes_per_token * len(outgoing.heads) // self._layout.num_kv_heads
        raw_bytes = max(0, outgoing.num_tokens - held_tokens) * token_bytes
        if not raw_bytes:
            return
        question = TransferQuestion(
            transfer_id=outgoing.transfer_id,
            request_id=outgoing.request_id,
            peer=transfer.pair.peer.worker_id,
            raw_bytes=raw_bytes,
            num_tokens=outgoing.num_tokens,
            terms=transfer.terms,
            link=self._view(transfer.pair),
        )
        choice = self._profiles.choose(question)
        transfer.profile = choice.profile
        outgoing.encoder, outgoing.selection = choice.encoder, choice.selection
        outgoing.expected_bytes = self._profiles.expected_bytes(choice.profile, raw_bytes)
        even = -(-raw_bytes // config.frames_per_transfer)
        outgoing.frame_raw_bytes = min(max(even, config.min_frame_raw_bytes), config.max_frame_raw_bytes)

    def _view(self, pair: SenderPair) -> LinkView:
        unsent = sum(
            max(0, transfer.outgoing.expected_bytes - transfer.outgoing.payload_bytes)
            for transfer in self._transfers.values()
            if transfer.pair is pair
        )
        return pair.pump.link.gauge.view(unsent)

    def _observe(self, transfer: _Transfer, failure: str) -> None:
        outgoing = transfer.outgoing
        self._profiles.settle(
            outgoing.transfer_id,
            outgoing.payload_bytes,
            committed_at=transfer.committed_at,
            goodput_bytes_per_s=transfer.pair.pump.link.gauge.view(0).goodput_bytes_per_s,
            failure=failure,
        )

    def _settle_when_unread(self, transfer: _Transfer, tell: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def settle() -> None:
            del self._transfers[transfer.session.transfer_id]
            self._quota.ended(transfer.pair.peer.worker_id)
            transfer.done.set_result(None)
            tell()

        transfer.outgoing.gate.close(lambda: loop.call_soon_threadsafe(settle))
        transfer.pair.pump.wake()
