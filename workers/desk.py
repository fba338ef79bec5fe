"""The spine of both request desks: feeds machines events, performs the effects that both know, arms their one timer.

A role's desk (`prefill_workers.desk`, `decode_workers.desk`) owns one and adds what differs: how a submission is judged
and begun, what the transfer service says, the role's own effects. Every callback from outside is a turn: its events are
fed, then `end_turn` sends what is to be said.

Concurrency: the event loop's thread only.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from core.alarm import Alarm
from core.clock import Clock
from core.errors import InvalidRequest, InvalidTransition, RejectedError, ServingError, WorkerLost
from core.gateway_streams import GatewayStreams
from core.ids import RequestId, TransferId
from core.membership import LoadReport
from core.request import GenerateRequest
from core.request_table import RequestMachine, RequestTable
from core.streams import Outbox
from core.task_set import TaskSet
from core.worker_life import WorkerLife
from engine.engine import Engine
from engine.loop import EngineLoop, Failure, StepResult
from grammar.library import GrammarLibrary
from grammar.walk import Grammar
from workers import messages as m
from workers.metrics import WorkerMetrics

Stream = Outbox[Any]  # of reports: the shared ones and the role's own


class Machine(RequestMachine, Protocol):
    """What the desk needs of a request's state machine. It takes every shared event and its role's own."""

    ended_by: str

    @property
    def request(self) -> GenerateRequest: ...

    @property
    def is_closed(self) -> bool: ...

    def handle(self, event: Any, now: float) -> Sequence[Any]: ...


M = TypeVar("M", bound=Machine)
E = TypeVar("E")  # events that only the role knows
F = TypeVar("F")  # effects that only the role performs
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a desk lives in.

    Attributes:
        streams: reports go there.
        grammars: of the requests with a constraint.
        number_load: makes of a load a report that may be sent.
        on_turn: called at the end of each turn; the load may have changed.
    """

    life: WorkerLife
    engine: EngineLoop
    streams: GatewayStreams[Any]
    grammars: GrammarLibrary
    metrics: WorkerMetrics
    clock: Clock
    number_load: Callable[[LoadReport], LoadReport]
    on_turn: Callable[[], None]


class RequestDesk(Generic[M, E, F]):
    """All requests of one worker, from the model being loaded until the end.

    Args:
        perform: does a role's own effect.
        stop_transfer: returns when nothing of a transfer touches our blocks any more.
        load: the worker's load now; it goes with every answer.
    """

    def __init__(
        self,
        around: Surroundings,
        perform: Callable[[M, Stream, F], None],
        stop_transfer: Callable[[TransferId, str], Awaitable[None]],
        load: Callable[[], LoadReport],
    ) -> None:
        self._around = around
        self._perform_own = perform
        self._stop_transfer = stop_transfer
        self._load = load
        self._table = RequestTable[M, Stream]()
        self._alarm = Alarm(around.clock, self._on_deadline)
        self._tasks = TaskSet(self.on_defect)
        self._emptied = asyncio.Event()
        self._emptied.set()

    def __len__(self) -> int:
        return len(self._table)

    def get(self, request_id: RequestId) -> M | None:
        return self._table.get(request_id)

    def of_transfer(self, transfer_id: TransferId) -> M | None:
        return self._table.of_transfer(transfer_id)

    def is_known(self, request_id: RequestId, transfer_id: TransferId | None) -> bool:
        """Tell whether either id is in use here."""
        return request_id in self._table or (transfer_id is not None and self.of_transfer(transfer_id) is not None)

    async def until_empty(self) -> None:
        """Return when nothing is held for anybody."""
        await self._emptied.wait()

    async def close(self, deadline_s: float) -> None:
        """End timers and tasks; nothing may come in any more."""
        self._alarm.disarm()
        await self._tasks.close(deadline_s)

    # What everybody may say of requests: each call is a turn

    def add(self, machine: M, stream: Stream) -> None:
        """Take a machine in. Not a turn of its own: who adds begins it, and ends the turn."""
        self._table.add(machine, stream)

    def accept(self, stream: Stream, request_id: RequestId) -> None:
        """Say that the request is ours; it was added, so that the load has it. Not a turn of its own."""
        self._answer(stream, m.SendAccepted(request_id, 0, "submitted"))

    def reject(self, stream: Stream, request_id: RequestId, error: RejectedError) -> None:
        """Say that nothing was kept. Not a turn of its own."""
        self._answer(stream, m.SendRejected(request_id, error, "submitted"))
        self._around.metrics.note_refusal(error.reason)

    def abort(self, stream: Stream, request_id: RequestId, reason: str) -> None:
        self.tell(stream, request_id, m.AbortRequested(reason))

    def tell(self, stream: Stream, request_id: RequestId, event: E | m.SharedEvent) -> None:
        """Take what a gateway says of a request; ignored unless this stream brought it and it is here still."""
        machine = self._table.get(request_id)
        if machine is not None and self._table.stream_of(machine) is stream:
            self.take(machine, event)

    def disconnect(self, stream: Stream) -> None:
        """Give up what came over a stream that has ended."""
        self._feed_all(self._table.of_stream(stream), m.GatewayLost())

    def abandon(self, error: ServingError) -> None:
        """Give everything up."""
        self._feed_all(self._table, m.WorkerClosed(error))

    def on_engine_failure(self, failure: Failure) -> None:
        # Retryable, whatever the engine says of it: another worker may succeed, and the gateway bounds the attempts.
        # Only what is wrong with the request itself is wrong everywhere.
        error = failure.error if isinstance(failure.error, InvalidRequest) else WorkerLost(str(failure.error))
        lost = [machine for request_id in failure.request_ids if (machine := self._table.get(request_id)) is not None]
        self._feed_all(lost, m.EngineFailed(error))

    def take(self, machine: M, event: E | m.SharedEvent) -> None:
        """One event as a turn of its own."""
        self.feed(machine, event)
        self.end_turn()

    # Within a turn

    def feed(self, machine: M, event: E | m.SharedEvent, now: float | None = None) -> None:
        if self._table.get(machine.request_id) is not machine:
            return  # a late word about a request that is done with
        try:
            effects = machine.handle(event, self._around.clock.now() if now is None else now)
        except InvalidTransition as error:
            self.on_defect(error)
            return
        stream = self._table.stream_of(machine)
        for effect in effects:
            self._perform(machine, stream, effect)
        if machine.is_closed:
            self._table.remove(machine)
            self._around.metrics.note_end(machine.ended_by)

    def feed_step(self, result: StepResult) -> None:
        """What a step of the engine says of requests that are here still."""
        now = self._around.clock.now()
        for admission in result.stats.admitted:
            machine = self._table.get(admission.request_id)
            if machine is not None:
                self.feed(machine, m.Scheduled(admission.cached_tokens), now - result.step_s)
        for output in result.outputs:
            machine = self._table.get(output.request_id)
            if machine is not None:
                self.feed(machine, m.news_of(output), now)

    def end_turn(self) -> None:
        self._around.streams.flush()
        self._alarm.arm(self._table.next_deadline())
        if len(self._table):
            self._emptied.clear()
        else:
            self._emptied.set()
        self._around.on_turn()

    # What takes time

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        self._tasks.spawn(work, name)

    def ask_engine(self, function: Callable[[Engine], T], then: Callable[[Future[T]], None]) -> None:
        """Have the engine's thread run `function` between steps, and the event loop `then` with what came of it."""
        loop = asyncio.get_running_loop()
        self._around.engine.call(function).add_done_callback(lambda done: loop.call_soon_threadsafe(then, done))

    def supply(self, machine: M) -> None:
        """Have the grammar of a request that the engine has taken compiled, if it needs one, and given to the engine.

        Nobody waits for it but this request, which fails if there is no such grammar.
        """

        def supplied(done: Future[None]) -> None:
            error = done.exception()
            if error is not None:
                self.on_defect(error)

        async def work() -> None:
            grammar = await self.grammar_of(machine)
            if grammar is not None:
                self.ask_engine(lambda engine: engine.supply(machine.request_id, grammar), supplied)

        if machine.request.sampling.constraint is not None:
            self.spawn(work(), f"grammar of {machine.request_id}")

    async def grammar_of(self, machine: M) -> Grammar | None:
        """Return the grammar of a request with a constraint; None: there is none, and the request was told."""
        constraint = machine.request.sampling.constraint
        assert constraint is not None
        try:
            return await self._around.grammars.get(constraint)
        except ServingError as error:
            self.take(machine, m.EngineFailed(error))
            return None

    def free(self, machine: M, function: Callable[[Engine], object]) -> None:
        """Have the engine let go of a request by `function`; then its machine learns `BlocksFreed`."""

        def freed(done: Future[object]) -> None:
            error = done.exception()
            if error is not None and not isinstance(error, ServingError):
                self.on_defect(error)
            self.take(machine, m.BlocksFreed())  # an engine that has ended holds nothing either

        self.ask_engine(function, freed)

    def on_defect(self, error: BaseException) -> None:
        """Something happened that must not: this incarnation is not to be trusted any further."""
        known = error if isinstance(error, ServingError) else WorkerLost(f"internal error: {error!r}")
        self._around.life.fail(known)

    # Inside

    def _perform(self, machine: M, stream: Stream, effect: F | m.SharedEffect) -> None:
        match effect:
            case m.SendOutput(output):
                self._around.streams.output(stream, output)
            case m.SendAccepted() | m.SendRejected():
                self._answer(stream, effect)
            case m.SendComputed():
                self._around.streams.precede(stream, effect)
                self._around.metrics.note_computed(effect, machine.request.num_prompt_tokens)
            case m.SendFailed():
                self._around.streams.follow(stream, effect)
            case m.StopTransfer(reason=reason):
                self.spawn(self._stop(machine, reason), f"stop {machine.request_id}")
            case m.AbortInEngine(request_id):
                self.free(machine, lambda engine: engine.abort(request_id))
            case _:
                self._perform_own(machine, stream, effect)

    def _answer(self, stream: Stream, answer: m.SendAccepted | m.SendRejected) -> None:
        self._around.streams.follow(stream, m.SendAnswer(answer, self._around.number_load(self._load())))

    async def _stop(self, machine: M, reason: str) -> None:
        if machine.transfer_id is not None:
            await self._stop_transfer(machine.transfer_id, reason)
        self.take(machine, m.TransferStopped())

    def _feed_all(self, machines: Iterable[M], event: m.SharedEvent) -> None:
        for machine in machines:
            self.feed(machine, event)
        self.end_turn()

    def _on_deadline(self) -> None:
        self._feed_all(self._table.due(self._around.clock.now()), m.DeadlinePassed())
