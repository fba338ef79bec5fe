"""Workers for the benchmark of gateways, in a process of their own: they speak the real protocol, take no time, and
emit one token of every stream per step, as an engine does; each step as soon as gRPC takes it, or at a pace.

One prefill and one decode worker. The hand-over between them is a line in a table. When each token left is written
down, by the request's id, for whoever compares that with when a client had it.
"""

import asyncio
import contextlib
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from core.clock import MonotonicClock
from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from core.registration import Registration, RegistrationConfig
from core.rpc import bind, create_server
from core.store_redis import RedisStore
from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from protos import worker_pb2_grpc as pb_grpc
from protos.codec import kv_events_to_wire

_EPOCH = 1
_LOAD_PERIOD_S = 0.25
Commands = AsyncIterator[wpb.PrefillCommand] | AsyncIterator[wpb.DecodeCommand]


@dataclass(frozen=True, slots=True)
class Setting:
    """What the process is given. `token_ids`: the answers, over and over."""

    redis_url: str
    cluster: str
    token_ids: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Work:
    """One stream."""

    work_id: str
    sent_at: "array[float]"
    num_tokens: int
    next_index: int = 0


@dataclass(slots=True)
class _Floor:
    """What both workers know."""

    token_ids: tuple[int, ...]
    tokens_per_s: float = 0.0  # of a stream; 0: as fast as they are read
    sent_at: "dict[str, array[float]]" = field(default_factory=dict)
    landings: dict[str, Callable[[], None]] = field(default_factory=dict)
    landed: set[str] = field(default_factory=set)

    def times_of(self, work_id: str) -> "array[float]":
        return self.sent_at.setdefault(work_id.rpartition("/")[0], array("d"))

    def land(self, work_id: str) -> None:
        """The prompt's KV is at the decode worker, which may hear of the work only later."""
        on_landed = self.landings.pop(work_id, None)
        if on_landed is None:
            self.landed.add(work_id)
        else:
            on_landed()

    def token(self, index: int) -> pb.GeneratedToken:
        return pb.GeneratedToken(index=index, token_id=self.token_ids[index % len(self.token_ids)])


class _Prefill(pb_grpc.PrefillWorkerServicer):
    """Every prompt is computed as it comes."""

    def __init__(self, floor: _Floor) -> None:
        self._floor = floor
        self._finish = wpb.WorkFinish(reason=pb.FINISH_REASON_LENGTH)

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, commands: AsyncIterator[wpb.PrefillCommand], context: "pb_grpc._ServicerContext"
    ) -> None:
        write, floor = context.write, self._floor
        await write(wpb.PrefillReport(welcome=wpb.Welcome(worker_id="p0", epoch=_EPOCH)))
        async for command in commands:
            match command.WhichOneof("command"):
                case "submit":
                    submit, work_id = command.submit, command.submit.request.request_id
                    await write(wpb.PrefillReport(accepted=wpb.Accepted(request_id=work_id)))
                    is_all = submit.request.sampling.max_tokens == 1
                    output = wpb.WorkOutput(
                        request_id=work_id, tokens=[floor.token(0)], finish=self._finish if is_all else None
                    )
                    floor.times_of(work_id).append(time.monotonic())
                    await write(wpb.PrefillReport(outputs=wpb.OutputBatch(outputs=[output])))
                    await write(wpb.PrefillReport(computed=wpb.PrefillComputed(request_id=work_id)))
                    if not submit.bind_later and not is_all:
                        await self._hand_over(work_id, submit.decode_worker_id, context)
                case "bind":
                    await self._hand_over(command.bind.request_id, command.bind.decode_worker_id, context)

    async def _hand_over(self, work_id: str, decode_worker: str, context: "pb_grpc._ServicerContext") -> None:
        assert decode_worker, "this fleet always has a decode worker"
        self._floor.land(work_id)
        await context.write(wpb.PrefillReport(handed_over=wpb.HandedOver(request_id=work_id)))

    async def ListCachedBlocks(  # noqa: N802
        self, request: wpb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> wpb.ListCachedBlocksResponse:
        return wpb.ListCachedBlocksResponse(worker_id="p0", epoch=_EPOCH)

    async def ListKvDecisions(  # noqa: N802
        self, request: wpb.ListKvDecisionsRequest, context: "pb_grpc._ServicerContext"
    ) -> wpb.ListKvDecisionsResponse:
        return wpb.ListKvDecisionsResponse(worker_id="p0", epoch=_EPOCH)


class _Decode(pb_grpc.DecodeWorkerServicer):
    """A batch for each gateway."""

    def __init__(self, floor: _Floor) -> None:
        self._floor = floor

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, commands: AsyncIterator[wpb.DecodeCommand], context: "pb_grpc._ServicerContext"
    ) -> None:
        batch = _Batch(self._floor)
        batch.tell(wpb.DecodeReport(welcome=wpb.Welcome(worker_id="d0", epoch=_EPOCH)))
        reading = asyncio.create_task(batch.read(commands), name="commands")
        try:
            while (report := await batch.next()) is not None:
                await context.write(report)
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def ListCachedBlocks(  # noqa: N802
        self, request: wpb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> wpb.ListCachedBlocksResponse:
        return wpb.ListCachedBlocksResponse(worker_id="d0", epoch=_EPOCH)


class _Batch:
    """What one gateway is owed: replies first, then steps."""

    def __init__(self, floor: _Floor) -> None:
        self._floor = floor
        self._replies: deque[wpb.DecodeReport] = deque()
        self._works: dict[str, _Work] = {}
        self._held: dict[str, _Work] = {}  # accepted, without their KV
        self._changed = asyncio.Event()
        self._is_over = False
        self._step_due_at = 0.0
        self._load_due_at = 0.0

    def tell(self, report: wpb.DecodeReport) -> None:
        self._replies.append(report)
        self._changed.set()

    async def read(self, commands: AsyncIterator[wpb.DecodeCommand]) -> None:
        try:
            async for command in commands:
                match command.WhichOneof("command"):
                    case "submit":
                        self._take(command.submit)
                    case "abort":
                        self._works.pop(command.abort.request_id, None)
                        self._held.pop(command.abort.request_id, None)
                        self._floor.landings.pop(command.abort.request_id, None)
        finally:
            self._is_over = True
            self._changed.set()

    async def next(self) -> wpb.DecodeReport | None:
        """What is to be sent now; None: nothing any more."""
        while not self._is_over:
            if self._replies:
                return self._replies.popleft()
            now = time.monotonic()
            if now >= self._load_due_at:
                self._load_due_at = now + _LOAD_PERIOD_S
                return wpb.DecodeReport(load=_load(len(self._works), len(self._held)))
            if self._works and now >= self._step_due_at:
                pace = self._floor.tokens_per_s
                # A pace is kept on average: a step that is late does not move those after it, unless by far.
                self._step_due_at = max(self._step_due_at + 1.0 / pace, now - 0.1) if pace else 0.0
                return self._step(now)
            due_at = min(self._load_due_at, self._step_due_at) if self._works else self._load_due_at
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due_at - now)):
                    await self._changed.wait()
        return None

    def _take(self, submit: wpb.DecodeSubmit) -> None:
        request = submit.request
        work = _Work(request.request_id, self._floor.times_of(request.request_id), request.sampling.max_tokens)
        self.tell(wpb.DecodeReport(accepted=wpb.Accepted(request_id=work.work_id)))
        if submit.generate:
            self._works[work.work_id] = work
            return
        work.next_index = 1
        self._held[work.work_id] = work
        self._floor.landings[work.work_id] = lambda: self._landed(work)
        if work.work_id in self._floor.landed:
            self._floor.landed.discard(work.work_id)
            self._floor.land(work.work_id)

    def _landed(self, work: _Work) -> None:
        if self._held.pop(work.work_id, None) is not None:
            self.tell(wpb.DecodeReport(landed=wpb.KvLanded(request_id=work.work_id, kv_lossless=True)))
            self._works[work.work_id] = work

    def _step(self, now: float) -> wpb.DecodeReport:
        report, floor = wpb.DecodeReport(), self._floor
        add = report.outputs.outputs.add
        for work in list(self._works.values()):
            output = add(request_id=work.work_id)
            index = work.next_index
            output.tokens.append(floor.token(index))
            work.sent_at.append(now)
            work.next_index = index + 1
            if index + 1 == work.num_tokens:
                output.finish.reason = pb.FINISH_REASON_LENGTH
                del self._works[work.work_id]
        return report


_sequence = 0


def _load(num_running: int, num_reserved: int) -> wpb.WorkerLoad:
    global _sequence  # one decode worker, whatever the number of its gateways
    _sequence += 1
    return wpb.WorkerLoad(
        sequence=_sequence, num_running=num_running, num_reserved=num_reserved, free_blocks=100_000,
        total_blocks=100_000, prefill_tokens_per_s=100_000.0, decode_step_s=0.001,
    )  # fmt: skip


def serve(setting: Setting, pipe: Connection) -> None:
    """Run the fleet, steered by `pipe`: ("pace", tokens per second of a stream), ("times", None) -> by request id,
    when each token left since the last such question, ("stop", None)."""
    asyncio.run(_serve(setting, pipe))


async def _serve(setting: Setting, pipe: Connection) -> None:
    floor = _Floor(setting.token_ids)
    store = RedisStore(setting.redis_url)
    servers, registrations = [], []
    for role, servicer in ((Role.PREFILL, _Prefill(floor)), (Role.DECODE, _Decode(floor))):
        server = create_server()
        if isinstance(servicer, _Prefill):
            pb_grpc.add_PrefillWorkerServicer_to_server(servicer, server)
        else:
            pb_grpc.add_DecodeWorkerServicer_to_server(servicer, server)
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        servers.append(server)
        registrations.append(_register(role, f"127.0.0.1:{port}", store, setting.cluster))
    stopped = asyncio.Event()

    def obey() -> None:
        what, value = pipe.recv()
        if what == "pace":
            floor.tokens_per_s = value
        elif what == "times":
            told, floor.sent_at = floor.sent_at, {}
            pipe.send({name: list(times) for name, times in told.items()})
        else:
            stopped.set()

    asyncio.get_running_loop().add_reader(pipe.fileno(), obey)
    pipe.send("ready")
    await stopped.wait()
    for registration in registrations:
        await registration.stop(1.0)
    for running in servers:
        await running.stop(None)
    await store.close()


def _register(role: Role, address: str, store: RedisStore, cluster: str) -> Registration:
    record = WorkerRecord(
        worker_id=WorkerId("p0" if role is Role.PREFILL else "d0"), role=role, epoch=Epoch(_EPOCH),
        state=WorkerState.READY, address=address, model="flood", layout_fingerprint="flood", weights_version="flood",
        dtype="float32", kv_bytes_per_token=1024, block_size=16, max_model_len=2048,
        load=LoadReport(free_blocks=100_000, total_blocks=100_000, prefill_tokens_per_s=100_000.0),
    )  # fmt: skip
    registration = Registration(
        store, cluster, record, RegistrationConfig(), MonotonicClock(),
        encode=lambda batch: kv_events_to_wire(batch).SerializeToString(),
        on_fenced=lambda epoch: None, on_failed=lambda error: None,
    )  # fmt: skip
    registration.start()
    return registration
