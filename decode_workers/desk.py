"""What a decode worker makes of requests: gets blocks for them, expects their KV, lets them run, tells of it.

Events come from gateways (`submit`), from the engine's thread by way of the event loop (`on_step`) and from the
receiver (`on_landed`, `on_failed`); the rest is the spine's (`workers.desk`). A submission that cannot succeed is
refused at once; the others are answered when the engine, between two steps, has reserved their blocks, or taken a
prompt that is computed here. KV that arrives goes from the receiver's threads straight into the pool.

Concurrency: the event loop's thread only.
"""

import asyncio
import logging
from concurrent.futures import Future

from core.errors import RejectedError, ServingError, WorkerLost
from core.ids import TransferId
from core.membership import LoadReport
from core.request import GenerateRequest
from decode_workers import messages as m
from decode_workers import policy
from decode_workers.config import DecodeWorkerConfig
from decode_workers.metrics import DecodeMetrics
from decode_workers.state import DecodeRequest
from engine.engine import Engine
from engine.loop import StepResult
from grammar.walk import Grammar
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import LandedStats
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.session import NackReason
from workers.desk import RequestDesk, Stream
from workers.messages import EngineFailed, TransferFailed
from workers.profiles import get_ready, profiles_for
from workers.service import Opening

_log = logging.getLogger(__name__)


class DecodeDesk:
    """Implements `workers.service.Desk`, and the outcomes of the receiver."""

    def __init__(self, config: DecodeWorkerConfig, opening: Opening, metrics: DecodeMetrics) -> None:
        engine, around = opening.engine, opening.around
        self._config = config
        self._around = around
        self._metrics = metrics
        self._engine_load = engine.load_report()
        self._asked: set[DecodeRequest] = set()  # the engine was asked about them, and does not count them yet
        self._limits = policy.DecodeLimits(
            config.max_requests,
            engine.model_info.max_model_len,
            self._engine_load.total_blocks,
            engine.layout.block_size,
        )
        self._layout = engine.layout
        self._profiles = profiles_for(config.transfer, config.model.path, engine.layout)
        self.transfers = KvReceiver(
            config.transfer,
            opening.identity,
            engine.layout,
            engine,
            self,
            around.clock,
            metrics=KvTransferMetrics(around.metrics.registry),
        )
        self.requests = RequestDesk[DecodeRequest, m.OwnEvent, m.OwnEffect](
            around, self._perform, self.transfers.cancel, lambda: self.load
        )

    @property
    def load(self) -> LoadReport:
        """The engine's load, and what it was asked to take since."""
        load = self._engine_load
        if not self._asked:
            return load
        to_land = [machine.request.num_prompt_tokens for machine in self._asked if machine.expected is not None]
        to_compute = [machine.request.num_prompt_tokens for machine in self._asked if machine.expected is None]
        return load.model_copy(
            update={
                "num_waiting": load.num_waiting + len(self._asked),
                "num_reserved": load.num_reserved + len(to_land),
                "reserved_tokens": load.reserved_tokens + sum(to_land),
                "queued_prefill_tokens": load.queued_prefill_tokens + sum(to_compute),
            }
        )

    def submit(
        self,
        stream: Stream,
        request: GenerateRequest,
        expected: m.Expected | None,
        terms: policy.Terms = policy.NO_TERMS,
    ) -> None:
        """Accept or reject, by a report: at once, or after the engine was asked.

        Args:
            expected: the transfer of its KV; None: the prompt is computed here.
        """
        refusal = self._refusal(request, expected, terms)
        if refusal is not None:
            self.requests.reject(stream, request.request_id, refusal)
        else:
            machine = DecodeRequest(
                request,
                expected,
                now=self._around.clock.now(),
                compute_timeout_s=self._config.compute_timeout_s,
                landing_timeout_s=self._config.landing_timeout_s,
            )
            self.requests.add(machine, stream)
            self._asked.add(machine)
            self._ask(machine)
        self.requests.end_turn()

    async def begin(self) -> None:
        await asyncio.to_thread(get_ready, self._profiles, self._layout)

    async def end(self) -> None:
        await self.transfers.close()

    # The receiver's outcomes

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        machine = self.requests.of_transfer(transfer_id)
        if machine is not None:
            landed = m.KvLanded(
                first_token_id,
                stats.exposed_s,
                stats.raw_bytes,
                stats.wire_bytes,
                stats.profile,
                stats.profile_is_lossless,
                stats.dropped_tokens,
            )
            _log.debug(
                "%s: %d bytes of KV landed as %d under profile %s",
                machine.request_id, landed.kv_bytes, landed.kv_wire_bytes, landed.kv_profile,
            )  # fmt: skip
            self.requests.take(machine, landed)

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        machine = self.requests.of_transfer(transfer_id)
        if machine is not None:
            failed = m.TransferCancelled if reason == NackReason.CANCELLED else TransferFailed
            self.requests.take(machine, failed(reason, detail))

    # The engine's news

    def on_step(self, result: StepResult) -> None:
        self.requests.feed_step(result)
        self._engine_load = result.load
        self._metrics.note_step(result)
        self.requests.end_turn()

    # Inside

    def _refusal(
        self, request: GenerateRequest, expected: m.Expected | None, terms: policy.Terms
    ) -> RejectedError | None:
        is_known = self.requests.is_known(request.request_id, expected.transfer_id if expected else None)
        load = self.load
        accounts = policy.DecodeAccounts(
            self._around.life.state,
            len(self.requests),
            load.free_blocks,
            load.queued_prefill_tokens,
            load.decode_step_s,
        )
        return policy.refusal(policy.DecodeDemand(request.num_prompt_tokens, is_known, terms), accounts, self._limits)

    def _ask(self, machine: DecodeRequest) -> None:
        """Ask the engine for blocks, or to take the prompt; its answer is the gateway's."""

        def ask(engine: Engine) -> tuple[m.BlocksReserved | m.PromptQueued, LoadReport]:
            answer: m.BlocksReserved | m.PromptQueued
            if machine.expected is None:
                answer = m.PromptQueued(engine.add(machine.request))
            else:
                answer = m.BlocksReserved(engine.reserve(machine.request).held_tokens)
            return answer, engine.load_report()  # now, not after the step that follows

        def answered(done: Future[tuple[m.BlocksReserved | m.PromptQueued, LoadReport]]) -> None:
            self._asked.discard(machine)
            match done.exception():
                case None:
                    answer, load = done.result()
                    self._engine_load = load.with_rates_of(self._engine_load)
                    self.requests.take(machine, answer)
                    self.requests.supply(machine)
                case ServingError() as error:
                    self.requests.take(machine, m.EngineRefused(error))
                case error:
                    self.requests.on_defect(error)

        self.requests.ask_engine(ask, answered)

    async def _expect(self, machine: DecodeRequest, expected: m.ExpectTransfer) -> None:
        try:
            await self.transfers.expect(
                expected.transfer_id, expected.request_id, expected.held_tokens, expected.num_tokens, expected.lease_s
            )
        except ServingError as error:
            self.requests.take(machine, TransferFailed("not_expected", str(error)))

    async def _activate_with_grammar(self, machine: DecodeRequest, activate: m.ActivateInEngine) -> None:
        """The KV may land before the grammar is there."""
        grammar = await self.requests.grammar_of(machine)
        if grammar is not None:
            self._activate(machine, activate, grammar)

    def _activate(self, machine: DecodeRequest, activate: m.ActivateInEngine, grammar: Grammar | None = None) -> None:
        def activated(done: Future[None]) -> None:
            match done.exception():
                case None:
                    pass
                case ServingError() as error:
                    self.requests.take(machine, EngineFailed(WorkerLost(str(error))))
                case error:
                    self.requests.on_defect(error)

        def join(engine: Engine) -> None:
            if grammar is not None:
                engine.supply(activate.request_id, grammar)
            engine.activate(
                activate.request_id,
                (activate.first_token_id,),
                exact=activate.is_exact,
                num_dropped=activate.num_dropped,
            )

        self.requests.ask_engine(join, activated)

    def _perform(self, machine: DecodeRequest, stream: Stream, effect: m.OwnEffect) -> None:
        match effect:
            case m.ExpectTransfer():
                self.requests.spawn(self._expect(machine, effect), f"expect {machine.transfer_id}")
            case m.ActivateInEngine() if machine.request.sampling.constraint is not None:
                self.requests.spawn(self._activate_with_grammar(machine, effect), f"activate {machine.request_id}")
            case m.ActivateInEngine():
                self._activate(machine, effect)
            case m.SendLanded():
                self._around.streams.precede(stream, effect)
                self._metrics.note_landed(effect)
