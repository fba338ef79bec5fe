"""The shell around the request machines: feeds them events, performs their effects, arms their one timer.

Events come from gateways (`submit`, `abort`, `disconnect`), from the engine's thread by way of the event loop
(`on_step`, `on_engine_failure`) and from the sender (`on_acked`, `on_failed`). A submission is answered at once, from
the desk's own accounts, without waiting for the engine's running step; what the engine refuses after all is reported as
a failure. KV that is ready goes from the engine's thread straight to the sender: sending overlaps with computing.

Concurrency: the event loop's thread only, but for `_Pusher`.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from core.alarm import Alarm
from core.clock import Clock
from core.errors import InvalidRequest, InvalidTransition, RejectedError, ServingError, WorkerLost
from core.gateway_streams import GatewayStreams
from core.ids import RequestId, TransferId
from core.membership import LoadReport
from core.request import GenerateRequest
from core.request_table import RequestTable
from core.streams import Outbox
from core.task_set import TaskSet
from core.worker_life import WorkerLife
from engine.contract import PrefillObserver
from engine.engine import Engine
from engine.loop import EngineLoop, Failure, StepResult
from kv_transfer.ports import Peer
from kv_transfer.sender import KvSender
from prefill_workers import messages as m
from prefill_workers import policy
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.metrics import PrefillMetrics
from prefill_workers.state import PrefillRequest, PrefillState

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
        config: PrefillWorkerConfig,
        limits: policy.PrefillLimits,
        life: WorkerLife,
        streams: GatewayStreams[m.Report],
        metrics: PrefillMetrics,
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
        self._table = RequestTable[PrefillRequest, Stream]()
        self._alarm = Alarm(clock, self._on_deadline)
        self._tasks = TaskSet(self._on_defect)
        self._unqueued_tokens: dict[RequestId, int] = {}  # accepted here, not yet in the engine's own count
        self._engine_load = engine_load
        self._on_turn = on_turn
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._engine: EngineLoop
        self._sender: KvSender

    def open(self, engine: EngineLoop, sender: KvSender) -> None:
        """Set to work; both report to this desk. Called once, before the first submission."""
        self._engine = engine
        self._sender = sender

    @property
    def load(self) -> LoadReport:
        """The engine's load, and what was accepted since."""
        load = self._engine_load
        return load.model_copy(
            update={
                "num_waiting": load.num_waiting + len(self._unqueued_tokens),
                "queued_prefill_tokens": load.queued_prefill_tokens + sum(self._unqueued_tokens.values()),
            }
        )

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

    def submit(self, stream: Stream, request: GenerateRequest, hand_off: m.HandOff | None) -> None:
        refusal = self._refusal(request, hand_off)
        if refusal is not None:
            self._streams.follow(stream, m.SendRejected(request.request_id, refusal))
            self._metrics.requests.labels("rejected", refusal.reason).inc()
        elif hand_off is None and request.sampling.max_tokens > 1:
            error = InvalidRequest("transfer_id", "is needed when more than one token is wanted")
            self._streams.follow(stream, m.SendFailed(request.request_id, error, "submitted"))
            self._metrics.requests.labels("rejected", "invalid").inc()
        else:
            machine = PrefillRequest(
                request,
                hand_off,
                now=self._clock.now(),
                compute_timeout_s=self._config.compute_timeout_s,
                send_timeout_s=self._config.send_timeout_s,
            )
            self._table.add(machine, stream)
            self._unqueued_tokens[request.request_id] = request.num_prompt_tokens
            self._streams.follow(stream, m.SendAccepted(request.request_id))
            self._tasks.spawn(self._begin(machine), f"begin {request.request_id}")
        self._end_turn()

    def abort(self, stream: Stream, request_id: RequestId, reason: str) -> None:
        machine = self._table.get(request_id)
        if machine is not None and self._table.stream_of(machine) is stream:
            self._take(machine, m.AbortRequested(reason))

    def disconnect(self, stream: Stream) -> None:
        for machine in self._table.of_stream(stream):
            self._feed(machine, m.GatewayLost())
        self._end_turn()

    # The sender's outcomes

    def on_acked(self, transfer_id: TransferId) -> None:
        machine = self._table.of_transfer(transfer_id)
        if machine is not None:
            self._take(machine, m.TransferAcked())

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        machine = self._table.of_transfer(transfer_id)
        if machine is not None:
            self._take(machine, m.TransferFailed(reason, detail))

    # The engine's news

    def on_step(self, result: StepResult) -> None:
        now = self._clock.now()
        for admission in result.stats.admitted:
            machine = self._table.get(admission.request_id)
            if machine is not None:
                self._feed(machine, m.Scheduled(admission.cached_tokens), now - result.step_s)
        for output in result.outputs:
            machine = self._table.get(output.request_id)
            if machine is not None:
                self._feed(machine, m.LastTokenComputed(output) if output.finish else m.FirstTokenComputed(output), now)
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

    def _refusal(self, request: GenerateRequest, hand_off: m.HandOff | None) -> RejectedError | None:
        is_known = request.request_id in self._table
        if hand_off is not None:
            is_known = is_known or self._table.of_transfer(hand_off.transfer_id) is not None
        load = self.load
        accounts = policy.PrefillAccounts(
            self._life.state, len(self._table), load.queued_prefill_tokens, load.prefill_tokens_per_s
        )
        return policy.refusal(policy.PrefillDemand(request.num_prompt_tokens, is_known), accounts, self._limits)

    async def _begin(self, machine: PrefillRequest) -> None:
        """Offer the KV, then queue the prompt: nothing is computed before the sender knows what to do with it."""
        hand_off = machine.hand_off
        observer: PrefillObserver = _Silent()
        if hand_off is not None:
            peer = Peer(hand_off.worker_id, hand_off.epoch, hand_off.address)
            observer = _Pusher(self._sender, hand_off.transfer_id)
            try:
                await self._sender.offer(
                    hand_off.transfer_id, machine.request_id, machine.request.num_prompt_tokens, peer
                )
            except ServingError as error:
                self._take(machine, m.TransferFailed("not_offered", str(error)))
                return
        if machine.state is not PrefillState.COMPUTING:
            return

        def queue(engine: Engine) -> LoadReport:
            engine.add_prefill(machine.request, observer)
            return engine.load_report()  # now, not after the step that follows: until then it would be counted nowhere

        def queued(done: Future[LoadReport]) -> None:
            if self._table.get(machine.request_id) is machine:
                self._unqueued_tokens.pop(machine.request_id, None)
            match done.exception():
                case None:
                    rates = self._engine_load.model_dump(include={"prefill_tokens_per_s", "decode_step_s"})
                    self._engine_load = done.result().model_copy(update=rates)
                    self._end_turn()
                case ServingError() as error:
                    self._take(machine, m.EngineFailed(error))
                case error:
                    self._on_defect(error)

        self._ask(queue, queued)

    async def _stop_transfer(self, machine: PrefillRequest, reason: str) -> None:
        if machine.transfer_id is not None:
            await self._sender.abort(machine.transfer_id, reason)
        self._take(machine, m.TransferStopped())

    def _free(self, machine: PrefillRequest, free: Callable[[Engine], object]) -> None:
        def freed(done: Future[object]) -> None:
            error = done.exception()
            if error is not None and not isinstance(error, ServingError):
                self._on_defect(error)
            self._take(machine, m.BlocksFreed())  # an engine that has ended holds nothing either

        self._ask(free, freed)

    def _ask(self, function: Callable[[Engine], T], then: Callable[[Future[T]], None]) -> None:
        """Have the engine's thread run `function` between steps, and the event loop `then` with what came of it."""
        loop = asyncio.get_running_loop()
        self._engine.call(function).add_done_callback(lambda done: loop.call_soon_threadsafe(then, done))

    def _take(self, machine: PrefillRequest, event: m.Event) -> None:
        """One event as a turn of its own."""
        self._feed(machine, event)
        self._end_turn()

    def _feed(self, machine: PrefillRequest, event: m.Event, now: float | None = None) -> None:
        if self._table.get(machine.request_id) is not machine:
            return  # a late word about a request that is done with
        try:
            effects = machine.handle(event, self._clock.now() if now is None else now)
        except InvalidTransition as error:
            self._on_defect(error)
            return
        stream = self._table.stream_of(machine)
        for effect in effects:
            self._perform(machine, stream, effect)
        if machine.is_closed:
            self._unqueued_tokens.pop(machine.request_id, None)
            self._table.remove(machine)
            self._metrics.note_end(machine.ended_by)

    def _perform(self, machine: PrefillRequest, stream: Stream, effect: m.Effect) -> None:
        match effect:
            case m.SendOutput(output):
                self._streams.output(stream, output)
            case m.SendComputed():
                self._streams.follow(stream, effect)
                self._metrics.note_computed(effect, machine.request.num_prompt_tokens)
            case m.SendHandedOver() | m.SendFailed():
                self._streams.follow(stream, effect)
            case m.CommitTransfer(transfer_id, first_token_id):
                self._sender.commit(transfer_id, first_token_id)
            case m.StopTransfer(reason=reason):
                self._tasks.spawn(self._stop_transfer(machine, reason), f"stop {machine.request_id}")
            case m.ReleaseBlocks(request_id):
                self._free(machine, lambda engine: engine.release(request_id))
            case m.AbortInEngine(request_id):
                self._free(machine, lambda engine: engine.abort(request_id))

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


class _Pusher:
    """Tells the sender what is ready. On the engine's thread."""

    def __init__(self, sender: KvSender, transfer_id: TransferId) -> None:
        self._sender = sender
        self._transfer_id = transfer_id

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        self._sender.push(self._transfer_id, layers, tokens)


class _Silent:
    """Of a request without hand-off."""

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        pass
