"""A gateway in front of fake workers, over real gRPC on this machine."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.clock import MonotonicClock
from core.ids import WorkerId
from core.membership import LoadReport
from core.rpc import connect
from core.store_memory import MemoryStore
from protos import admin_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from router.config import RouterConfig
from router.service import Gateway
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.prefill import FakePrefillWorker
from tests.fakes.reading import Reading
from tests.fakes.script import PATIENCE_S, FakeNetwork, Reply, echo_alphabet

CLUSTER = "test"


@dataclass
class FakeCluster:
    """Everything that a test of the gateway needs."""

    store: MemoryStore
    network: FakeNetwork
    prefills: list[FakePrefillWorker]
    decodes: list[FakeDecodeWorker]
    gateway: Gateway
    address: str
    channel: grpc.aio.Channel
    others: list[FakePrefillWorker | FakeDecodeWorker] = field(default_factory=list)

    @property
    def inference(self) -> "inference_pb2_grpc.InferenceAsyncStub":
        return inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def admin(self) -> "admin_pb2_grpc.AdminAsyncStub":
        return admin_pb2_grpc.AdminStub(self.channel)

    @property
    def health(self) -> Any:  # its stubs are untyped
        return health_pb2_grpc.HealthStub(self.channel)

    async def wait_health(self, wanted: int, service: str = "") -> None:
        """Follow the health of a service until it is `wanted`."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=service))
        async with asyncio.timeout(PATIENCE_S):
            async for reply in watch:
                if reply.status == wanted:
                    break
        watch.cancel()

    async def wait_serving(self) -> None:
        await self.wait_health(health_pb2.HealthCheckResponse.SERVING)

    @property
    def workers(self) -> list[FakePrefillWorker | FakeDecodeWorker]:
        return [*self.prefills, *self.decodes]

    def holds_nothing(self) -> bool:
        """Say whether the gateway has no request, and none on the books of a worker."""
        dispatcher, credit = self.gateway.dispatcher, self.gateway.fleet.credit
        return dispatcher.num_active == dispatcher.num_queued == 0 and not any(
            dispatcher.num_on_worker(worker.worker_id) or credit.of(worker.worker_id).num_requests
            for worker in self.workers
        )

    def generate(self, request: pb.GenerateRequest, timeout: float | None = None) -> Reading:
        """Begin a generation."""
        return Reading(self.inference.Generate(request, timeout=timeout))

    async def wait_fleet(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the gateway's mirror or links change."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.gateway.fleet.changed.next().wait()

    async def wait_cache(self, num_blocks: int) -> None:
        """Wait until the prefix index has so many entries."""
        index, stored = self.gateway.fleet.index, asyncio.Event()
        store = index.store

        def store_and_tell(*arguments: Any, **named: Any) -> None:
            store(*arguments, **named)
            stored.set()

        with mock.patch.object(index, "store", store_and_tell):
            async with asyncio.timeout(PATIENCE_S):
                while len(index) != num_blocks:
                    stored.clear()
                    await stored.wait()

    async def wait_load(self, worker_id: WorkerId, condition: Callable[[LoadReport], bool]) -> None:
        """Wait until the gateway knows such a load of a worker."""
        table, told = self.gateway.fleet.table, asyncio.Event()
        report = table.report

        def report_and_tell(*arguments: Any) -> None:
            report(*arguments)
            told.set()

        with mock.patch.object(table, "report", report_and_tell):
            async with asyncio.timeout(PATIENCE_S):
                while (row := table.row(worker_id)) is None or not condition(row.load):
                    told.clear()
                    await told.wait()

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight."""
        assert await self.gateway.dispatcher.wait_idle(PATIENCE_S)

    async def wait_live(self, count: int) -> None:
        """Wait until so many workers can be asked."""
        await self.wait_fleet(lambda: sum(self.gateway.fleet.count_live().values()) == count)


def text_request(text: str = "hello", *, max_tokens: int = 5, **fields: Any) -> pb.GenerateRequest:
    """Return a greedy request; `fields` are of the request or of its terms."""
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens)
    request = pb.GenerateRequest(text=text, sampling=sampling)
    terms = {name: fields.pop(name) for name in list(fields) if name in pb.RequestTerms.DESCRIPTOR.fields_by_name}
    request.MergeFrom(pb.GenerateRequest(terms=pb.RequestTerms(**terms), **fields))
    return request


@asynccontextmanager
async def fake_cluster(
    checkpoint: Path,
    *,
    num_prefills: int = 1,
    num_decodes: int = 1,
    reply: Callable[[Any], Reply] = echo_alphabet,
    is_waited_for: bool = True,
    **config: Any,
) -> AsyncIterator[FakeCluster]:
    """Bring up workers and a gateway; everything is closed at the end."""
    settings: dict[str, Any] = {
        "port": 0,
        "model_path": checkpoint,
        "served_model_name": "fake",
        "retry_min_s": 0.005,
        "retry_max_s": 0.05,
        **config,
    }
    settings["mirror"] = {"poll_interval_s": 0.02, "forget_after_s": 0.1, **config.get("mirror", {})}
    # Nobody works alone, and nobody is chosen late, unless a test is about that: most look at what both workers do.
    settings["routing"] = {"modes": ["remote_prefill"], "late_binding": False, **config.get("routing", {})}
    settings["workers"] = {"reconnect_min_s": 0.01, "reconnect_max_s": 0.05, **config.get("workers", {})}
    store = MemoryStore()
    network = FakeNetwork(reply)
    prefills = [FakePrefillWorker(f"p{index}", network, store, CLUSTER) for index in range(num_prefills)]
    decodes = [FakeDecodeWorker(f"d{index}", network, store, CLUSTER) for index in range(num_decodes)]
    gateway = Gateway(RouterConfig.model_validate(settings), CLUSTER, store, MonotonicClock(), rng=random.Random(1))
    async with AsyncExitStack() as stack:
        workers: list[FakePrefillWorker | FakeDecodeWorker] = [*prefills, *decodes]
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
        address = await gateway.start()
        stack.push_async_callback(gateway.stop, 0.0)
        channel = connect(address)
        stack.push_async_callback(channel.close)
        cluster = FakeCluster(store, network, prefills, decodes, gateway, address, channel)
        if is_waited_for and num_prefills and num_decodes:
            await cluster.wait_serving()
            await cluster.wait_live(num_prefills + num_decodes)
        yield cluster
        for extra in cluster.others:
            await extra.kill()
