"""The shell around the request machines: feeds them events, performs their effects, arms their one timer.

Events come from gateways (`submit`, `abort`, `disconnect`), from the engine's thread by way of the event loop
(`on_step`, `on_engine_failure`) and from the receiver (`on_landed`, `on_failed`). A submission that cannot succeed is
refused at once; the others are answered when the engine, between two steps, has reserved their blocks. KV that arrives
goes from the receiver's threads straight into the pool.

Concurrency: the event loop's thread only.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from core.alarm import Alarm
from core.clock import Clock
from core.errors import InvalidTransition, RejectedError, ServingError, WorkerLost
from core.gateway_streams import GatewayStreams
from core.ids import RequestId, TransferId
from core.membership import LoadReport
from core.request import GenerateRequest
from core.request_table import RequestTable
from core.streams import Outbox
from core.task_set import TaskSet
from core.worker_life import WorkerLife
from decode_workers import messages as m
from decode_workers import policy
from decode_workers.config import DecodeWorkerConfig
from decode_workers.metrics import DecodeMetrics
from decode_workers.state import DecodeRequest
from engine.engine import Engine, Reservation
from engine.loop import EngineLoop, Failure, StepResult
from kv_transfer.ports import LandedStats
from kv_transfer.receiver import KvReceiver
from kv_transfer.session import NackReason

Stream = Outbox[m.Report]
T = TypeVar("T")


class RequestDesk:
    """All requests of one worker, from the model being loaded until the end.

    Args:
        streams: reports go there; the desk flushes it at the end of each turn.
        engine_load: before the first step.
        on_turn: called at the end of each turn; the load may have changed.
    """

    def __init__(
        self,
        config: DecodeWorkerConfig,
        limits: policy.DecodeLimits,
        life: WorkerLife,
        streams: GatewayStreams[m.Report],
        metrics: DecodeMetrics,
        clock: Clock,
        engine_load: LoadReport,
        on_turn: Callable[[], None],
    ) -> None:
        self._config = config
        self._limits = limits
        self._life = life
        self._streams = streams
        self._metrics = metrics
        self._clock = clock
        self._table = RequestTable[DecodeRequest, Stream]()
        self._alarm = Alarm(clock, self._on_deadline)
        self._tasks = TaskSet(self._on_defect)
        self._engine_load = engine_load
        self._on_turn = on_turn
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._engine: EngineLoop
        self._receiver: KvReceiver

    def open(self, engine: EngineLoop, receiver: KvReceiver) -> None:
        """Set to work; both report to this desk. Called once, before the first submission."""
        self._engine = engine
        self._receiver = receiver

    @property
    def load(self) -> LoadReport:
        """The engine's load after its last turn."""
        return self._engine_load

    def __len__(self) -> int:
        return len(self._table)

    async def until_empty(self) -> None:
        """Return when nothing is held for anybody."""
        await self._emptied.wait()

    def abandon(self, error: ServingError) -> None:
        """Give everything up."""
        for machine in self._table:
            self._feed(machine, m.WorkerClosed(error))
        self._end_turn()

    async def close(self, deadline_s: float) -> None:
        """End timers and tasks; nothing may come in any more."""
        self._alarm.disarm()
        await self._tasks.close(deadline_s)

    # Gateways

    def submit(self, stream: Stream, request: GenerateRequest, transfer_id: TransferId, lease_s: float) -> None:
        refusal = self._refusal(request, transfer_id)
        if refusal is not None:
            self._streams.follow(stream, m.SendRejected(request.request_id, refusal, "submitted"))
            self._metrics.requests.labels("rejected", refusal.reason).inc()
        else:
            machine = DecodeRequest(
                request, transfer_id, lease_s=lease_s, landing_timeout_s=self._config.landing_timeout_s
            )
            self._table.add(machine, stream)
            self._reserve(machine)
        self._end_turn()

    def abort(self, stream: Stream, request_id: RequestId, reason: str) -> None:
        machine = self._table.get(request_id)
        if machine is not None and self._table.stream_of(machine) is stream:
            self._take(machine, m.AbortRequested(reason))

    def disconnect(self, stream: Stream) -> None:
        for machine in self._table.of_stream(stream):
            self._feed(machine, m.GatewayLost())
        self._end_turn()

    # The receiver's outcomes

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        machine = self._table.of_transfer(transfer_id)
        if machine is not None:
            self._take(machine, m.KvLanded(first_token_id, stats.exposed_s, stats.payload_bytes))

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        machine = self._table.of_transfer(transfer_id)
        if machine is not None:
            failed = m.TransferCancelled if reason == NackReason.CANCELLED else m.TransferFailed
            self._take(machine, failed(reason, detail))

    # The engine's news

    def on_step(self, result: StepResult) -> None:
        for output in result.outputs:
            machine = self._table.get(output.request_id)
            if machine is not None:
                self._feed(machine, m.StreamFinished(output) if output.finish else m.TokensProduced(output))
        self._engine_load = result.load
        self._end_turn()

    def on_engine_failure(self, failure: Failure) -> None:
        # Retryable, whatever the engine says of it: another worker may succeed, and the gateway bounds the attempts.
        error = WorkerLost(str(failure.error))
        for request_id in failure.request_ids:
            machine = self._table.get(request_id)
            if machine is not None:
                self._feed(machine, m.EngineFailed(error))
        self._end_turn()

    # Inside

    def _refusal(self, request: GenerateRequest, transfer_id: TransferId) -> RejectedError | None:
        is_known = request.request_id in self._table or self._table.of_transfer(transfer_id) is not None
        load = self._engine_load
        accounts = policy.DecodeAccounts(self._life.state, len(self._table), load.free_blocks, load.decode_step_s)
        return policy.refusal(policy.DecodeDemand(request.num_prompt_tokens, is_known), accounts, self._limits)

    def _reserve(self, machine: DecodeRequest) -> None:
        def reserved(done: Future[Reservation]) -> None:
            match done.exception():
                case None:
                    self._take(machine, m.BlocksReserved(done.result().held_tokens))
                case ServingError() as error:
                    self._take(machine, m.ReservationRefused(error))
                case error:
                    self._on_defect(error)

        self._ask(lambda engine: engine.reserve(machine.request), reserved)

    async def _expect(self, machine: DecodeRequest, expected: m.ExpectTransfer) -> None:
        try:
            await self._receiver.expect(
                expected.transfer_id, expected.request_id, expected.held_tokens, expected.num_tokens, expected.lease_s
            )
        except ServingError as error:
            self._take(machine, m.TransferFailed("not_expected", str(error)))

    async def _stop_transfer(self, machine: DecodeRequest, reason: str) -> None:
        await self._receiver.cancel(machine.transfer_id, reason)
        self._take(machine, m.TransferStopped())

    def _activate(self, machine: DecodeRequest, first_token_id: int) -> None:
        def activated(done: Future[None]) -> None:
            match done.exception():
                case None:
                    pass
                case ServingError() as error:
                    self._take(machine, m.EngineFailed(WorkerLost(str(error))))
                case error:
                    self._on_defect(error)

        self._ask(lambda engine: engine.activate(machine.request_id, (first_token_id,)), activated)

    def _free(self, machine: DecodeRequest) -> None:
        def freed(done: Future[bool]) -> None:
            error = done.exception()
            if error is not None and not isinstance(error, ServingError):
                self._on_defect(error)
            self._take(machine, m.BlocksFreed())  # an engine that has ended holds nothing either

        self._ask(lambda engine: engine.abort(machine.request_id), freed)

    def _ask(self, function: Callable[[Engine], T], then: Callable[[Future[T]], None]) -> None:
        """Have the engine's thread run `function` between steps, and the event loop `then` with what came of it."""
        loop = asyncio.get_running_loop()
        self._engine.call(function).add_done_callback(lambda done: loop.call_soon_threadsafe(then, done))

    def _take(self, machine: DecodeRequest, event: m.Event) -> None:
        """One event as a turn of its own."""
        self._feed(machine, event)
        self._end_turn()

    def _feed(self, machine: DecodeRequest, event: m.Event) -> None:
        if self._table.get(machine.request_id) is not machine:
            return  # a late word about a request that is done with
        try:
            effects = machine.handle(event, self._clock.now())
        except InvalidTransition as error:
            self._on_defect(error)
            return
        stream = self._table.stream_of(machine)
        for effect in effects:
            self._perform(machine, stream, effect)
        if machine.is_closed:
            self._table.remove(machine)
            self._metrics.note_end(machine.ended_by)

    def _perform(self, machine: DecodeRequest, stream: Stream, effect: m.Effect) -> None:
        match effect:
            case m.ExpectTransfer():
                self._tasks.spawn(self._expect(machine, effect), f"expect {machine.transfer_id}")
            case m.ActivateInEngine(first_token_id=first_token_id):
                self._activate(machine, first_token_id)
            case m.StopTransfer(reason=reason):
                self._tasks.spawn(self._stop_transfer(machine, reason), f"stop {machine.transfer_id}")
            case m.AbortInEngine():
                self._free(machine)
            case m.SendLanded():
                self._streams.precede(stream, effect)
                self._metrics.note_landed(effect)
            case m.SendOutput(output):
                self._streams.output(stream, output)
            case m.SendAccepted() | m.SendRejected() | m.SendFailed():
                self._streams.follow(stream, effect)

    def _on_deadline(self) -> None:
        for machine in self._table.due(self._clock.now()):
            self._feed(machine, m.DeadlinePassed())
        self._end_turn()

    def _end_turn(self) -> None:
        self._streams.flush()
        self._alarm.arm(self._table.next_deadline())
        if len(self._table):
            self._emptied.clear()
        else:
            self._emptied.set()
        self._on_turn()

    def _on_defect(self, error: BaseException) -> None:
        """Something happened that must not: this incarnation is not to be trusted any further."""
        self._life.fail(error if isinstance(error, ServingError) else WorkerLost(f"internal error: {error!r}"))
