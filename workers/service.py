"""The life of a worker of either role: load the model, listen, register, tell the load, drain, stop.

What a role makes of requests is the affair of its desk, which the worker opens once the model is loaded. Who calls
what: gRPC calls `connect`, `abort`, `disconnect` and `list_cached_blocks` on the event loop, and the role's desk to
submit; the engine's thread posts every step to the loop, where the desk takes it and the KV events are published; the
cluster calls `start`, `run`, `drain` and `stop`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from core.clock import Clock, MonotonicClock
from core.errors import ServingError, WorkerLost
from core.gateway_streams import GatewayStreams
from core.ids import RequestId
from core.kv_events import BlocksStored, KvEvent, KvEventBatch
from core.membership import LoadReport, Role, WorkerIdentity, WorkerState
from core.store import Store
from core.streams import Outbox
from core.telemetry import MetricsServer
from core.worker_life import WorkerLife, layout_facts
from engine.engine import Engine
from engine.loop import EngineLoop, Failure, StepResult
from grammar.host import ModelTokens
from grammar.library import GrammarLibrary
from protos import codec
from workers.config import WorkerConfig
from workers.desk import RequestDesk, Surroundings
from workers.load_reports import LoadReports
from workers.messages import SendLoad, SendOutputs
from workers.metrics import WorkerMetrics
from workers.rpc import GatewayCalls, WorkerServer

Progress = Callable[[str, float], None]
LoadEngine = Callable[[WorkerConfig, Progress], Engine]

_log = logging.getLogger(__name__)
_SNAPSHOT_TIMEOUT_S = 10.0  # a snapshot waits for the running step, not longer
_CLOSE_S = 5.0  # what every part is given to close, however late it is
_GRACE_S = 0.5  # for streams to take what was said last


class Desk(Protocol):
    """What a role makes of requests. All on the event loop."""

    @property
    def requests(self) -> RequestDesk[Any, Any, Any]: ...

    async def begin(self) -> None:
        """Get ready; the first submission may come when this has returned."""
        ...

    async def end(self) -> None:
        """End all transfers, and whatever else was begun. No request is left, or none that matters any more."""
        ...

    @property
    def load(self) -> LoadReport:
        """The worker's load now, as gateways should know it."""
        ...

    def on_step(self, result: StepResult) -> None:
        """The engine has made a turn."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What a desk is opened with; the engine's thread has not started, so the engine may still be asked directly.

    The desk's services are added to `server`; `calls` are what they all have.
    """

    identity: WorkerIdentity
    store: Store
    engine: Engine
    around: Surroundings
    server: WorkerServer
    calls: GatewayCalls


@dataclass(frozen=True, slots=True)
class _Parts:
    """What exists once the model is loaded."""

    engine: EngineLoop
    grammars: GrammarLibrary
    server: WorkerServer
    desk: Desk


class Worker:
    """One incarnation: `start`, `run` until it ends, `stop`; `drain` at any time between.

    Concurrency: one event loop; the engine's thread only posts to it.
    """

    def __init__(
        self,
        role: Role,
        config: WorkerConfig,
        identity: WorkerIdentity,
        store: Store,
        clock: Clock | None,
        metrics: WorkerMetrics,
        open_desk: Callable[[Opening], Desk],
        load_engine: LoadEngine | None = None,
    ) -> None:
        """
        Args:
            open_desk: called once the model is loaded.
            load_engine: in place of `Engine.load`; called on a thread of its own.
        """
        self.identity = identity
        self.metrics = metrics
        self._open_desk = open_desk
        self._load_engine = load_engine or _load_engine
        self._config = config
        self._store = store
        self._clock = clock or MonotonicClock()
        self._life = WorkerLife(
            store,
            identity,
            role,
            config.registration,
            self._clock,
            model=config.model.name,
            encode=_encode_events,
            on_failed=self._give_up,
        )
        self._streams = GatewayStreams[Any](config.max_unread_reports, SendOutputs)
        self._loads = LoadReports(
            self._clock,
            self._measure_load,
            self._say_load,
            interval_s=config.load_interval_s,
            heartbeat_s=config.load_heartbeat_s,
        )
        self._parts: _Parts | None = None
        self._metrics_server: MetricsServer | None = None

    async def start(self) -> str:
        """Load the model, listen, register. Returns host:port.

        Raises:
            ConfigError: the model, the port or the memory cannot work; nothing is left.
            ServingError: fenced meanwhile; nothing is left.
        """
        self._life.registration.start()
        config = self._config
        self._life.move(WorkerState.LOADING, config.model.name, rack=config.topology.rack, zone=config.topology.zone)
        try:
            return await self._start()
        except BaseException:
            await self.stop(_CLOSE_S)
            raise

    async def run(self) -> None:
        """Return after `stop`.

        Raises:
            ServingError: the worker cannot go on (fenced, engine broken); everything was given up, call `stop`.
        """
        await self._life.until_end()

    async def drain(self, deadline_s: float) -> None:
        """Accept nothing more; return when nothing is left to do, or after `deadline_s`."""
        if self._parts is None:
            return
        if self._life.state is WorkerState.READY:
            self._life.move(WorkerState.DRAINING, f"{len(self._parts.desk.requests)} requests left")
        await self._emptied(deadline_s)

    async def stop(self, deadline_s: float) -> None:
        """Give up what is left and close everything. Idempotent; takes `deadline_s`, and little more at worst."""
        self._life.move(WorkerState.STOPPED)
        parts = self._parts
        if parts is not None:
            parts.desk.requests.abandon(self._life.failure or WorkerLost(f"{self.identity.worker_id} stops"))
            await self._emptied(deadline_s)
            self._parts = None
            self._streams.close()
            await parts.server.stop(_GRACE_S)
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await parts.desk.end()
            except TimeoutError:
                _log.exception("%s: a KV link does not close; its thread is left behind", self.identity.worker_id)
            await parts.desk.requests.close(_CLOSE_S)
            if not await asyncio.to_thread(parts.engine.stop, max(deadline_s, _CLOSE_S)):
                _log.error("%s: the engine's step does not end; its thread is left behind", self.identity.worker_id)
            await parts.grammars.close()
        self._loads.close()
        await self._life.registration.stop(_CLOSE_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
            self._metrics_server = None
        self._life.end()

    async def _start(self) -> str:
        config, loop = self._config, asyncio.get_running_loop()

        def progress(stage: str, fraction: float) -> None:  # on the loading thread
            loop.call_soon_threadsafe(self._life.describe, f"{config.model.name}: {stage} ({fraction:.0%})")

        engine = await asyncio.to_thread(self._load_engine, config, progress)
        if self._life.state is WorkerState.STOPPED:
            raise self._life.failure or WorkerLost(f"{self.identity.worker_id} was stopped while it loaded")

        def post_step(result: StepResult) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(self._on_step, desk, result)

        def post_failure(failure: Failure) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(self._on_engine_failure, desk, failure)

        server = WorkerServer(config.host, config.port, config.tls)
        name = f"engine {self.identity.worker_id}"
        engine_loop = EngineLoop(engine, post_step, post_failure, clock=self._clock, name=name)
        grammars = GrammarLibrary(config.grammar, _tokens_of(config, engine), self._clock)
        around = Surroundings(
            self._life,
            engine_loop,
            self._streams,
            grammars,
            self.metrics,
            self._clock,
            number_load=self._loads.number,
            on_turn=self._loads.ask,
        )
        calls = GatewayCalls(self, config.hello_timeout_s)
        try:
            desk = self._open_desk(Opening(self.identity, self._store, engine, around, server, calls))
        except BaseException:
            await server.stop(0.0)
            raise
        engine_loop.start()
        self._parts = _Parts(engine_loop, grammars, server, desk)
        if config.metrics_port is not None:
            self._metrics_server = MetricsServer(self.metrics.registry, config.host, config.metrics_port)
            self._life.registration.update(metrics_port=self._metrics_server.port)
        self._life.describe(f"{config.model.name}: getting ready to serve")
        await desk.begin()
        await server.start()
        self._loads.tell()
        facts = layout_facts(engine.layout, engine.model_info.max_model_len)
        self._life.move(WorkerState.READY, "", address=server.address, **facts)
        return server.address

    # What gateways ask

    def connect(self) -> Outbox[Any]:
        stream = self._streams.connect()
        self.metrics.gateways.set(len(self._streams))
        load = self._measure_load()
        if load is not None:
            stream.put(SendLoad(self._loads.number(load)))
        return stream

    def abort(self, stream: Outbox[Any], request_id: RequestId, reason: str) -> None:
        if self._parts is not None:  # else the stream is about to end
            self._parts.desk.requests.abort(stream, request_id, reason)

    def disconnect(self, stream: Outbox[Any]) -> None:
        self._streams.disconnect(stream)
        self.metrics.gateways.set(len(self._streams))
        if self._parts is not None:
            self._parts.desk.requests.disconnect(stream)

    async def list_cached_blocks(self) -> tuple[int, list[BlocksStored]]:
        """Return the number of the last event that the snapshot includes, and its chains.

        Events are taken right before the snapshot on the engine's thread, and published in the order of that thread:
        a reader that goes on from the number misses nothing, and what it sees twice says the same.

        Raises:
            ServingError: the engine has stopped, or its step does not end.
        """
        answer: asyncio.Future[tuple[int, list[BlocksStored]]] = asyncio.Future()

        def publish(done: Future[tuple[list[KvEvent], list[BlocksStored]]]) -> None:
            error = done.exception()
            if error is None:
                events, chains = done.result()
                sequence = self._life.registration.publish(events)
                if not answer.done():
                    answer.set_result((sequence, chains))
            elif not answer.done():
                answer.set_exception(error)

        if self._parts is None:
            raise WorkerLost(f"{self.identity.worker_id} has stopped")
        loop = asyncio.get_running_loop()
        self._parts.engine.call(lambda engine: (engine.take_kv_events(), engine.snapshot_cache())).add_done_callback(
            lambda done: loop.call_soon_threadsafe(publish, done)
        )
        try:
            async with asyncio.timeout(_SNAPSHOT_TIMEOUT_S):
                return await answer
        except TimeoutError as error:
            raise WorkerLost(f"{self.identity.worker_id}: the engine's step does not end") from error

    # What the engine says, on the event loop

    def _on_step(self, desk: Desk, result: StepResult) -> None:
        desk.on_step(result)
        self._life.registration.publish(result.kv_events)
        self.metrics.note_load(result.load)

    def _on_engine_failure(self, desk: Desk, failure: Failure) -> None:
        desk.requests.on_engine_failure(failure)
        if failure.is_fatal:
            self._life.fail(WorkerLost(f"{self.identity.worker_id}: {failure.error}"))

    # Inside

    def _measure_load(self) -> LoadReport | None:
        return None if self._parts is None else self._parts.desk.load

    def _say_load(self, load: LoadReport) -> None:
        self._streams.broadcast(SendLoad(load))
        self._life.registration.update(load=load)
        self.metrics.store_lost.set(self._life.registration.is_store_lost)

    def _give_up(self, error: ServingError) -> None:
        """This life has failed: nobody may be served any more. Who waits in `run` learns of it and calls `stop`."""
        if self._parts is not None:
            self._parts.desk.requests.abandon(error)
        self._streams.close(error)

    async def _emptied(self, deadline_s: float) -> None:
        if self._parts is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await self._parts.desk.requests.until_empty()


def _load_engine(config: WorkerConfig, progress: Progress) -> Engine:
    return Engine.load(config.model, config.engine, progress=progress)


def _tokens_of(config: WorkerConfig, engine: Engine) -> ModelTokens:
    path, info = config.model.path, engine.model_info
    return ModelTokens(path if path.is_dir() else None, info.vocab_size, info.eos_token_ids)


def _encode_events(batch: KvEventBatch) -> bytes:
    return codec.kv_events_to_wire(batch).SerializeToString()
