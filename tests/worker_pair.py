"""A real prefill worker and a real decode worker in one process, and a gateway that does what a test tells it.

Engines run over `tests.fake_model` unless a test loads a model, so a wrong KV byte is a wrong token; gRPC is real, KV
crosses a memory link. A runner's gate holds a forward pass, an engine's gate holds the copying of KV: so a test can act
while a request is in any state, without sleeping.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import torch

from core.errors import RejectReason
from core.ids import Epoch, RequestId, WorkerId
from core.membership import WorkerIdentity
from core.registration import RegistrationConfig
from core.request import GenerateRequest, RequestOutput, SamplingParams
from core.rpc import connect
from core.store import Store
from core.store_memory import MemoryStore
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.forward import ForwardBatch
from kv_transfer.config import KvTransferConfig
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker
from protos import codec, worker_pb2, worker_pb2_grpc
from tests.fake_model import FakeRunner, greedy
from workers.service import Worker

PATIENCE_S = 20.0  # a deadline, not a duration: only a hang uses it up
EPOCH = Epoch(3)
P, D = WorkerId("p0"), WorkerId("d0")


class Gate:
    """Open at first. What passes through it waits while it is closed, and tells that it came."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    def close(self) -> None:
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            self._reached.set()
            assert self._open.wait(PATIENCE_S), "a test left its gate closed"

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)


class GatedRunner(FakeRunner):
    def __init__(self, gate: Gate, num_blocks: int) -> None:
        super().__init__(num_blocks=num_blocks)
        self._gate = gate

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        self._gate.pass_through()
        return super().forward(batch, on_layer)


class GatedEngine(Engine):
    """`copying` holds KV on its way into this pool."""

    copying: Gate

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: torch.Tensor, heads: range | None = None
    ) -> None:
        self.copying.pass_through()
        super().write_kv(request_id, layers, tokens, kv, heads)


@dataclass
class Side:
    """One worker's engine, and the gates that hold it."""

    num_blocks: int
    max_batch_tokens: int
    computing: Gate = field(default_factory=Gate)
    copying: Gate = field(default_factory=Gate)
    engine: GatedEngine | None = None
    runner: GatedRunner | None = None

    def load(self, config: object, progress: Callable[[str, float], None]) -> Engine:
        progress("loading a fake", 0.5)
        self.runner = GatedRunner(self.computing, self.num_blocks)
        self.engine = GatedEngine(
            self.runner,
            EngineConfig(
                block_size=4, num_blocks=self.num_blocks, max_batch_tokens=self.max_batch_tokens, layer_group_size=2
            ),
        )
        self.engine.copying = self.copying
        return self.engine


def check_empty(engine: Engine) -> None:
    """Assert, on its thread or after that has ended, that every block is free or cached and no request is left."""
    engine.check()
    load = engine.load_report()
    assert (load.free_blocks, load.num_running, load.num_waiting) == (load.total_blocks, 0, 0)
    assert not engine.request_ids


_Report = worker_pb2.PrefillReport | worker_pb2.DecodeReport


class WorkerStream:
    """A gateway's stream to one worker: sends commands, keeps every report, lets a test wait for one."""

    def __init__(self, address: str, stub: type, command: type, epoch: int = EPOCH) -> None:
        self._channel = connect(address)
        self._stub: Any = stub(self._channel)
        self._command: Any = command
        self._epoch = epoch
        self.reports: list[_Report] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.is_over = False
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> "WorkerStream":
        self._call = self._stub.Connect()
        self._reading = asyncio.create_task(self._read())
        await self.send(hello=worker_pb2.Hello(gateway_id="g", worker_epoch=self._epoch))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cut()
        await self._channel.close()

    async def cut(self) -> None:
        """End the stream as a gateway that dies does."""
        self._call.cancel()
        await self._reading

    async def send(self, **command: object) -> None:
        # gRPC takes one write at a time. A stream that is over takes none, and `error` tells why.
        async with self._writing:
            if not self._call.done():
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._call.write(self._command(**command))

    async def abort(self, request_id: str) -> None:
        await self.send(abort=worker_pb2.WorkAbort(request_id=request_id, reason="the test"))

    async def list_cached_blocks(self) -> worker_pb2.ListCachedBlocksResponse:
        reply: worker_pb2.ListCachedBlocksResponse = await self._stub.ListCachedBlocks(
            worker_pb2.ListCachedBlocksRequest(), timeout=PATIENCE_S
        )
        return reply

    async def list_kv_decisions(self, last: int) -> worker_pb2.ListKvDecisionsResponse:
        reply: worker_pb2.ListKvDecisionsResponse = await self._stub.ListKvDecisions(
            worker_pb2.ListKvDecisionsRequest(last=last), timeout=PATIENCE_S
        )
        return reply

    async def until(self, is_wanted: Callable[[_Report], bool]) -> Any:
        """Return the first report that is wanted, come or to come."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            while True:
                for report in self.reports:
                    if is_wanted(report):
                        return report
                assert not self.is_over, f"the stream is over: {self.error}"
                await self._changed.wait()

    async def answer(self, kind: str, request_id: str) -> Any:
        """Return the report of a kind about a request."""

        def is_it(report: _Report) -> bool:
            return report.WhichOneof("report") == kind and getattr(report, kind).request_id == request_id

        return getattr(await self.until(is_it), kind)

    async def until_over(self) -> grpc.aio.AioRpcError | None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([self._reading])
        return self.error

    def outputs(self, request_id: str) -> list[RequestOutput]:
        return [
            output
            for report in self.reports
            if report.HasField("outputs")
            for output in codec.outputs_from_wire(report.outputs)
            if output.request_id == request_id
        ]

    def kinds(self, request_id: str) -> list[str]:
        """Return what was said about a request, in order."""
        kinds: list[str] = []
        for report in self.reports:
            kind = report.WhichOneof("report") or ""
            if kind == "outputs":
                if any(output.request_id == request_id for output in report.outputs.outputs):
                    kinds.append(kind)
            elif getattr(getattr(report, kind), "request_id", None) == request_id:
                kinds.append(kind)
        return kinds

    async def until_finished(self, request_id: str) -> None:
        await self.until(
            lambda report: any(o.request_id == request_id and o.HasField("finish") for o in report.outputs.outputs)
        )

    async def _read(self) -> None:
        try:
            async for report in self._call:
                async with self._changed:
                    self.reports.append(report)
                    self._changed.notify_all()
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            pass  # we cut it
        async with self._changed:
            self.is_over = True
            self._changed.notify_all()


def prefill_stream(address: str, epoch: int = EPOCH) -> WorkerStream:
    return WorkerStream(address, worker_pb2_grpc.PrefillWorkerStub, worker_pb2.PrefillCommand, epoch)


def decode_stream(address: str, epoch: int = EPOCH) -> WorkerStream:
    return WorkerStream(address, worker_pb2_grpc.DecodeWorkerStub, worker_pb2.DecodeCommand, epoch)


@dataclass
class Pair:
    """Both workers, running, and this test's streams to them."""

    store: Store
    prefill: Worker
    decode: Worker
    prefill_side: Side
    decode_side: Side
    prefill_address: str
    decode_address: str
    to_prefill: WorkerStream
    to_decode: WorkerStream
    num_probes: int = 0

    async def submit_decode(self, request: GenerateRequest, *, attempt: int = 0, lease_s: float = 20.0) -> None:
        submit = worker_pb2.DecodeSubmit(
            request=codec.request_to_wire(request), transfer_id=f"{request.request_id}/{attempt}", lease_s=lease_s
        )
        await self.to_decode.send(submit=submit)

    async def submit_prefill(self, request: GenerateRequest, *, attempt: int = 0, hand_off: bool = True) -> None:
        submit = worker_pb2.PrefillSubmit(request=codec.request_to_wire(request))
        submit.kv_quality_floor = request.kv_quality_floor
        if hand_off:
            submit.transfer_id = f"{request.request_id}/{attempt}"
            submit.decode_worker_id, submit.decode_epoch = D, EPOCH
            submit.decode_address = self.decode_address
        await self.to_prefill.send(submit=submit)

    async def abort_prefill(self, request_id: str) -> None:
        """Return when the worker has taken the abort: a stream's commands are taken in order, and the probe is one."""
        self.num_probes += 1
        probe = request(f"probe{self.num_probes}")
        await self.to_prefill.abort(request_id)
        await self.submit_prefill(probe, hand_off=False)
        await self.to_prefill.answer("failed", probe.request_id)

    async def abort_decode(self, request_id: str) -> None:
        """As `abort_prefill`."""
        self.num_probes += 1
        probe = request(f"probe{self.num_probes}", 1000)
        await self.to_decode.abort(request_id)
        await self.submit_decode(probe)
        await self.to_decode.answer("rejected", probe.request_id)

    async def submit(self, request: GenerateRequest) -> None:
        """To both, as a gateway does."""
        await self.submit_decode(request)
        await self.to_decode.answer("accepted", request.request_id)
        await self.submit_prefill(request)
        await self.to_prefill.answer("accepted", request.request_id)

    async def generate(self, request: GenerateRequest) -> list[int]:
        """Return the tokens of a whole request, whose indices must be contiguous across both workers."""
        await self.submit(request)
        await self.to_prefill.answer("computed", request.request_id)
        if self.to_prefill.outputs(request.request_id)[-1].finish is not None:
            await self.to_decode.abort(request.request_id)
        else:
            await self.to_decode.until_finished(request.request_id)
            await self.to_prefill.answer("handed_over", request.request_id)
        return self.token_ids(request.request_id)

    def token_ids(self, request_id: str) -> list[int]:
        outputs = self.to_prefill.outputs(request_id) + self.to_decode.outputs(request_id)
        tokens = [token for output in outputs for token in output.tokens]
        assert [token.index for token in tokens] == list(range(len(tokens)))
        return [token.token_id for token in tokens]

    async def prefill_is_empty(self) -> None:
        """Return when the worker holds no request; then every block must be free or cached."""
        async with asyncio.timeout(PATIENCE_S):
            parts = self.prefill._parts
            assert parts is not None
            await parts.desk.requests.until_empty()
            await asyncio.wrap_future(parts.engine.call(check_empty))

    async def decode_is_empty(self) -> None:
        """As `prefill_is_empty`."""
        async with asyncio.timeout(PATIENCE_S):
            parts = self.decode._parts
            assert parts is not None
            await parts.desk.requests.until_empty()
            await asyncio.wrap_future(parts.engine.call(check_empty))

    async def until_idle(self) -> None:
        await self.prefill_is_empty()
        await self.decode_is_empty()


def request(name: str, prompt: int | tuple[int, ...] = 10, sampling: SamplingParams | None = None) -> GenerateRequest:
    """Return a request; an integer prompt is a length."""
    token_ids = tuple((7 * at + len(name)) % 90 for at in range(prompt)) if isinstance(prompt, int) else prompt
    return GenerateRequest(RequestId(name), token_ids, sampling or greedy(6))


@contextlib.asynccontextmanager
async def worker_pair(
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 8,
    max_queued_tokens: int = 1000,
    max_decode_requests: int = 64,
    metrics_port: int | None = None,
    hello_timeout_s: float = 10.0,
    backend: Any = "memory",
    store: Store | None = None,
    model: ModelConfig | None = None,
    engine: EngineConfig | None = None,
    transfer: Mapping[str, object] = MappingProxyType({}),
    replaced: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Pair]:
    """Start both; stop both; then every block of both must be free or cached.

    Args:
        model: a checkpoint to load in place of the fake.
        transfer: settings of KV transfer that differ from the test's usual ones.
        replaced: `prefill_address` or `decode_address`, of a worker elsewhere that takes the place of ours.
    """
    store = store or MemoryStore()
    sides = Side(num_blocks, max_batch_tokens), Side(num_blocks, max_batch_tokens)
    shared: dict[str, Any] = {
        "model": model or ModelConfig(path=Path("fake")),
        "engine": engine or EngineConfig(),
        "transfer": KvTransferConfig.model_validate(
            {"backend": backend, "slot_bytes": 4096, "credit_bytes": 65536, "lease_s": 15.0, **transfer}
        ),
        "registration": RegistrationConfig(lease_s=0.6),
        "load_interval_s": 0.001,
        "metrics_port": metrics_port,
        "hello_timeout_s": hello_timeout_s,
    }
    loaders: tuple[Any, Any] = (None, None) if model else (sides[0].load, sides[1].load)
    prefill = prefill_worker(
        PrefillWorkerConfig(**shared, max_queued_tokens=max_queued_tokens),
        WorkerIdentity(P, EPOCH, "test"),
        store,
        load_engine=loaders[0],
    )
    decode = decode_worker(
        DecodeWorkerConfig(**shared, max_requests=max_decode_requests),
        WorkerIdentity(D, EPOCH, "test"),
        store,
        load_engine=loaders[1],
    )
    try:
        own = await prefill.start(), await decode.start()
        addresses = replaced.get("prefill_address", own[0]), replaced.get("decode_address", own[1])
        async with prefill_stream(addresses[0]) as to_prefill, decode_stream(addresses[1]) as to_decode:
            yield Pair(store, prefill, decode, *sides, *addresses, to_prefill, to_decode)
    finally:
        for side in sides:
            side.computing.open()
            side.copying.open()
        await prefill.stop(PATIENCE_S)
        await decode.stop(PATIENCE_S)
    if model is None:
        for side in sides:
            assert side.engine is not None
            check_empty(side.engine)


def reason_of(rejected: worker_pb2.Rejected) -> RejectReason:
    return RejectReason(rejected.reason)
