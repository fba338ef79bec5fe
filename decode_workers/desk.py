"""What a decode worker makes of requests: reserves their blocks, expects their KV, lets them run, tells of it.

Events come from gateways (`submit`), from the engine's thread by way of the event loop (`on_step`) and from the
receiver (`on_landed`, `on_failed`); the rest is the spine's (`workers.desk`). A submission that cannot succeed is
refused at once; the others are answered when the engine, between two steps, has reserved their blocks. KV that arrives
goes from the receiver's threads straight into the pool.

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
from engine.engine import Engine, Reservation
from engine.loop import StepResult
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
            around, self._perform, self.transfers.cancel
        )

    @property
    def load(self) -> LoadReport:
        """The engine's load after its last turn."""
        return self._engine_load

    def submit(self, stream: Stream, request: GenerateRequest, transfer_id: TransferId, lease_s: float) -> None:
        """Accept or reject, by a report: at once, or after the engine was asked for blocks."""
        refusal = self._refusal(request, transfer_id)
        if refusal is not None:
            self.requests.reject(stream, request.request_id, refusal)
        else:
            landing_timeout_s = self._config.landing_timeout_s
            machine = DecodeRequest(request, transfer_id, lease_s=lease_s, landing_timeout_s=landing_timeout_s)
            self.requests.add(machine, stream)
            self._reserve(machine)
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
        for output in result.outputs:
            machine = self.requests.get(output.request_id)
            if machine is not None:
                self.requests.feed(machine, m.StreamFinished(output) if output.finish else m.TokensProduced(output))
        self._engine_load = result.load
        self._metrics.note_step(result)
        self.requests.end_turn()

    # Inside

    def _refusal(self, request: GenerateRequest, transfer_id: TransferId) -> RejectedError | None:
        is_known = self.requests.is_known(request.request_id, transfer_id)
        load, num_requests = self._engine_load, len(self.requests)
        accounts = policy.DecodeAccounts(self._around.life.state, num_requests, load.free_blocks, load.decode_step_s)
        return policy.refusal(policy.DecodeDemand(request.num_prompt_tokens, is_known), accounts, self._limits)

    def _reserve(self, machine: DecodeRequest) -> None:
        def reserved(done: Future[Reservation]) -> None:
            match done.exception():
                case None:
                    self.requests.take(machine, m.BlocksReserved(done.result().held_tokens))
                case ServingError() as error:
                    self.requests.take(machine, m.ReservationRefused(error))
                case error:
                    self.requests.on_defect(error)

        self.requests.ask_engine(lambda engine: engine.reserve(machine.request), reserved)

    async def _expect(self, machine: DecodeRequest, expected: m.ExpectTransfer) -> None:
        try:
            await self.transfers.expect(
                expected.transfer_id, expected.request_id, expected.held_tokens, expected.num_tokens, expected.lease_s
            )
        except ServingError as error:
            self.requests.take(machine, TransferFailed("not_expected", str(error)))

    def _activate(self, machine: DecodeRequest, activate: m.ActivateInEngine) -> None:
        def activated(done: Future[None]) -> None:
            match done.exception():
                case None:
                    pass
                case ServingError() as error:
                    self.requests.take(machine, EngineFailed(WorkerLost(str(error))))
                case error:
                    self.requests.on_defect(error)

        def join(engine: Engine) -> None:
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
            case m.ActivateInEngine():
                self._activate(machine, effect)
            case m.SendLanded():
                self._around.streams.precede(stream, effect)
                self._metrics.note_landed(effect)
