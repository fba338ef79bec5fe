"""What a prefill worker makes of requests: judges and begins them, hands their KV to the sender, tells of both.

Events come from gateways (`submit`), from the engine's thread by way of the event loop (`on_step`) and from the sender
(`on_acked`, `on_failed`); the rest is the spine's (`workers.desk`). A submission is answered at once, from the desk's
own accounts, without waiting for the engine's running step; what the engine refuses after all is reported as a failure.
KV that is ready goes from the engine's thread straight to the sender: sending overlaps with computing.

Concurrency: the event loop's thread only, but for `_Pusher`.
"""

import asyncio
from concurrent.futures import Future
from weakref import WeakKeyDictionary

from core.errors import RejectedError, ServingError
from core.ids import RequestId, TransferId
from core.kv_quality import quality_floor
from core.membership import LoadReport, Role, kv_controller_key
from core.request import GenerateRequest
from engine.engine import Engine
from engine.loop import StepResult
from kv_transfer.choice import TransferTerms
from kv_transfer.controller.keeper import MemoryKeeper
from kv_transfer.controller.opening import open_chooser
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import Peer
from kv_transfer.rpc import GrpcDialer
from kv_transfer.sender.sender import KvSender
from prefill_workers import messages as m
from prefill_workers import policy
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.kv_feed import KvFeed
from prefill_workers.metrics import PrefillMetrics
from prefill_workers.state import PrefillRequest, PrefillState
from workers.desk import RequestDesk, Stream
from workers.messages import EngineFailed, TransferFailed
from workers.profiles import get_ready, profiles_for, without_scores
from workers.service import Opening


class PrefillDesk:
    """Implements `workers.service.Desk`, and the outcomes of the sender."""

    def __init__(self, config: PrefillWorkerConfig, opening: Opening, metrics: PrefillMetrics) -> None:
        engine, around = opening.engine, opening.around
        self._config = config
        self._around = around
        self._metrics = metrics
        self._engine_load = engine.load_report()
        self._unqueued: set[PrefillRequest] = set()  # accepted here, not yet in the engine's own count
        self._feeds = WeakKeyDictionary[PrefillRequest, KvFeed]()  # of those to be handed over, as long as they live
        self._limits = policy.PrefillLimits(
            config.max_queued_tokens,
            min(config.max_requests, config.engine.max_num_waiting),
            engine.model_info.max_model_len,
            self._engine_load.total_blocks,
            engine.layout.block_size,
        )
        self.identity = opening.identity
        self._layout = engine.layout
        self._profiles = profiles_for(config.transfer, config.model.path, engine.layout)
        if config.engine.score_window == 0 or engine.model_info.has_sliding_window:
            self._profiles = without_scores(self._profiles, config.transfer.policy)
        self._chooser = open_chooser(
            config.transfer,
            self._profiles,
            around.clock,
            seed=opening.identity.epoch,
            registry=around.metrics.registry,
        )
        self._keeper = MemoryKeeper(
            self._chooser,
            opening.store,
            kv_controller_key(opening.identity.cluster, Role.PREFILL),
            interval_s=config.transfer.controller.save_interval_s,
        )
        self.transfers = KvSender(
            config.transfer,
            opening.identity,
            engine.layout,
            engine,
            self,
            around.clock,
            metrics=KvTransferMetrics(around.metrics.registry),
            chooser=self._chooser,
            tokens=engine,
            dialer=GrpcDialer(config.tls),
        )
        self.requests = RequestDesk[PrefillRequest, m.OwnEvent, m.OwnEffect](
            around, self._perform, self.transfers.abort, lambda: self.load
        )

    @property
    def load(self) -> LoadReport:
        """The engine's load, and what was accepted since."""
        load = self._engine_load
        unqueued_tokens = sum(machine.request.num_prompt_tokens for machine in self._unqueued)
        return load.model_copy(
            update={
                "num_waiting": load.num_waiting + len(self._unqueued),
                "queued_prefill_tokens": load.queued_prefill_tokens + unqueued_tokens,
            }
        )

    async def begin(self) -> None:
        await asyncio.to_thread(get_ready, self._profiles, self._layout)
        await self._keeper.load()
        self.requests.spawn(self._keeper.run(), "experience of the controller")

    async def end(self) -> None:
        await self._keeper.save()
        await self.transfers.close()

    def kv_decisions(self, last: int) -> list[dict[str, object]]:
        """Return the last decisions on compression profiles, newest first, as plain values."""
        return self._chooser.decisions(last)

    def submit(
        self,
        stream: Stream,
        request: GenerateRequest,
        hand_off: m.HandOff | None,
        *,
        max_queued_tokens: int | None = None,
    ) -> None:
        """Accept or reject at once, by a report. Without a hand-off all of it is generated here."""
        refusal = self._refusal(request, hand_off, max_queued_tokens)
        if refusal is not None:
            self.requests.reject(stream, request.request_id, refusal)
        else:
            machine = PrefillRequest(
                request,
                hand_off,
                now=self._around.clock.now(),
                compute_timeout_s=self._config.compute_timeout_s,
                bind_timeout_s=self._config.bind_timeout_s,
                send_timeout_s=self._config.send_timeout_s,
            )
            self.requests.add(machine, stream)
            self._unqueued.add(machine)
            self.requests.accept(stream, request.request_id)
            if hand_off is not None:
                self._feeds[machine] = KvFeed(self.transfers, hand_off.transfer_id)
            if hand_off is not None and hand_off.to is not None:
                self.requests.spawn(self._offer_and_queue(machine, hand_off.to), f"begin {request.request_id}")
            else:
                self._queue(machine)  # now: the word where it goes on may come next
        self.requests.end_turn()

    def bind(self, stream: Stream, request_id: RequestId, to: m.Destination | None) -> None:
        """Name the decode worker of a request that was submitted without one; None: generate it here."""
        self.requests.tell(stream, request_id, m.KeptHere() if to is None else m.Bound(to))

    # The sender's outcomes

    def on_acked(self, transfer_id: TransferId) -> None:
        machine = self.requests.of_transfer(transfer_id)
        if machine is not None:
            self.requests.take(machine, m.TransferAcked(self._link_of(machine)))

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        machine = self.requests.of_transfer(transfer_id)
        if machine is not None:
            self.requests.take(machine, TransferFailed(reason, detail))

    # The engine's news

    def on_step(self, result: StepResult) -> None:
        self.requests.feed_step(result)
        self._engine_load = result.load
        self._metrics.note_step(result)
        self.requests.end_turn()

    # Inside

    def _refusal(
        self, request: GenerateRequest, hand_off: m.HandOff | None, max_queued_tokens: int | None
    ) -> RejectedError | None:
        is_known = self.requests.is_known(request.request_id, hand_off.transfer_id if hand_off else None)
        load = self.load
        accounts = policy.PrefillAccounts(
            self._around.life.state, len(self.requests), load.queued_prefill_tokens, load.prefill_tokens_per_s
        )
        demand = policy.PrefillDemand(request.num_prompt_tokens, is_known, max_queued_tokens)
        return policy.refusal(demand, accounts, self._limits)

    async def _offer_and_queue(self, machine: PrefillRequest, to: m.Destination) -> None:
        """Offer the KV, then queue the prompt: nothing is computed for a peer that cannot be offered it."""
        await self._offer(machine, to)
        if machine.state is PrefillState.COMPUTING:
            self._queue(machine)
        else:
            self._unqueued.discard(machine)

    async def _offer(self, machine: PrefillRequest, to: m.Destination) -> None:
        """Offer the KV, and let go what is ready of it."""
        hand_off, request = machine.hand_off, machine.request
        if hand_off is None or machine.state not in (PrefillState.COMPUTING, PrefillState.SENDING):
            return  # given up meanwhile
        peer, terms = Peer(to.worker_id, to.epoch, to.address), self._terms(machine, hand_off)
        try:
            await self.transfers.offer(hand_off.transfer_id, request.request_id, request.num_prompt_tokens, peer, terms)
        except ServingError as error:
            self.requests.take(machine, TransferFailed("not_offered", str(error)))
        else:
            self._feeds[machine].open()

    def _queue(self, machine: PrefillRequest) -> None:
        request, feed = machine.request, self._feeds.get(machine)

        def queue(engine: Engine) -> LoadReport:
            if feed is None:
                engine.add(request)
            else:
                engine.add_prefill(request, feed)
            return engine.load_report()  # now, not after the step that follows: until then it would be counted nowhere

        def queued(done: Future[LoadReport]) -> None:
            self._unqueued.discard(machine)
            match done.exception():
                case None:
                    self._engine_load = done.result().with_rates_of(self._engine_load)
                    self.requests.end_turn()
                    self.requests.supply(machine)
                case ServingError() as error:
                    self.requests.take(machine, EngineFailed(error))
                case error:
                    self.requests.on_defect(error)

        self.requests.ask_engine(queue, queued)

    def _terms(self, machine: PrefillRequest, hand_off: m.HandOff) -> TransferTerms:
        load, floor = self.load, hand_off.quality_floor
        rate = load.prefill_tokens_per_s if machine.state is PrefillState.COMPUTING else 0.0
        num_tokens = max(1, load.queued_prefill_tokens - hand_off.cached_tokens)  # its own are among the queued
        return TransferTerms(
            quality_floor(self._config.transfer.quality) if floor is None else floor,
            hand_off.budget_s,
            machine.request.tenant,
            compute_s=num_tokens / rate if rate > 0 else 0.0,
        )

    def _keep(self, machine: PrefillRequest) -> None:
        def kept(done: Future[None]) -> None:
            match done.exception():
                case None:
                    pass
                case ServingError() as error:
                    self.requests.take(machine, EngineFailed(error))
                case error:
                    self.requests.on_defect(error)

        self.requests.ask_engine(lambda engine: engine.keep(machine.request_id), kept)

    def _link_of(self, machine: PrefillRequest) -> m.LinkFacts | None:
        to = machine.hand_off.to if machine.hand_off else None
        link = self.transfers.link_view(to.worker_id) if to else None
        return None if link is None else m.LinkFacts(link.goodput_bytes_per_s, link.rtt_s, link.queued_bytes)

    def _perform(self, machine: PrefillRequest, stream: Stream, effect: m.OwnEffect) -> None:
        match effect:
            case m.OfferTransfer(to):
                self.requests.spawn(self._offer(machine, to), f"offer {machine.transfer_id}")
            case m.KeepInEngine():
                self._keep(machine)
            case m.SendHandedOver():
                self._around.streams.follow(stream, effect)
            case m.CommitTransfer(first_token_id):
                self._feeds[machine].commit(first_token_id)
            case m.ReleaseBlocks(request_id):
                self.requests.free(machine, lambda engine: engine.release(request_id))
