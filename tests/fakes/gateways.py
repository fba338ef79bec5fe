"""Several gateways in one process, over one real Redis and real gRPC, in front of fake workers."""

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from core.clock import MonotonicClock
from core.rpc import connect
from core.store import STREAM_START
from core.store_redis import RedisStore
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.replicas.service import news_stream
from router.service import Gateway
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.prefill import FakePrefillWorker
from tests.fakes.reading import Reading
from tests.fakes.script import PATIENCE_S, FakeNetwork, client_id
from tests.redis_process import RedisProcess

CLUSTER = "gateways"


@dataclass
class GatewaySeat:
    """One gateway and a channel to it."""

    gateway: Gateway
    address: str
    channel: grpc.aio.Channel
    store: RedisStore

    @property
    def inference(self) -> "inference_pb2_grpc.InferenceAsyncStub":
        return inference_pb2_grpc.InferenceStub(self.channel)

    def generate(self, request: pb.GenerateRequest) -> Reading:
        return Reading(self.inference.Generate(request))

    async def wait_live(self, count: int) -> None:
        """Wait until so many workers can be asked."""
        async with asyncio.timeout(PATIENCE_S):
            while sum(self.gateway.fleet.count_live().values()) != count:
                await self.gateway.fleet.changed.next().wait()


@dataclass
class Gateways:
    """Everything that a test of several gateways needs."""

    checkpoint: Path
    settings: dict[str, Any]
    redis: RedisProcess
    store: RedisStore  # the workers' and the test's own
    network: FakeNetwork
    prefills: list[FakePrefillWorker]
    decodes: list[FakeDecodeWorker]
    stack: AsyncExitStack
    seats: list[GatewaySeat] = field(default_factory=list)

    async def add(self) -> GatewaySeat:
        """Start one more gateway, and wait until it has all workers."""
        store = RedisStore(self.redis.url)
        self.stack.push_async_callback(store.close)
        config = RouterConfig.model_validate(self.settings)
        gateway = Gateway(config, CLUSTER, store, MonotonicClock(), rng=random.Random(len(self.seats)))
        address = await gateway.start()
        self.stack.push_async_callback(gateway.stop, 0.0)
        channel = connect(address)
        self.stack.push_async_callback(channel.close)
        seat = GatewaySeat(gateway, address, channel, store)
        self.seats.append(seat)
        await seat.wait_live(len(self.prefills) + len(self.decodes))
        return seat

    async def wait_prefilling(self, request_id: str) -> None:
        """Wait until some prefill worker has the prompt."""
        await self._first(worker.wait_until(functools.partial(_holds, worker, request_id)) for worker in self.prefills)

    async def wait_aborted(self, request_id: str) -> None:
        """Wait until some prefill worker was told to let go of the prompt."""
        await self._first(worker.wait_aborted(request_id) for worker in self.prefills)

    async def _first(self, waits: Iterable[Coroutine[Any, Any, None]]) -> None:
        tasks = [asyncio.create_task(wait) for wait in waits]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that news among gateways brings about; they never fall silent."""
        cursor = STREAM_START
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                read = await self.store.read({news_stream(CLUSTER): cursor}, max_entries=1000, wait_s=1.0)
                cursor = read[news_stream(CLUSTER)][-1].entry_id if read else cursor
                await asyncio.sleep(0)


def _holds(worker: FakePrefillWorker, request_id: str) -> bool:
    return any(client_id(name) == request_id for name in worker.held)


@asynccontextmanager
async def several_gateways(
    folder: Path, checkpoint: Path, count: int, *, num_prefills: int = 2, num_decodes: int = 2, **config: Any
) -> AsyncIterator[Gateways]:
    """Bring up Redis, workers and gateways; everything is closed at the end."""
    settings: dict[str, Any] = {
        "port": 0,
        "model_path": checkpoint,
        "served_model_name": "fake",
        "retry_min_s": 0.005,
        "retry_max_s": 0.05,
        "mirror": {"poll_interval_s": 0.02, "forget_after_s": 60.0},
        "workers": {"reconnect_min_s": 0.01, "reconnect_max_s": 0.05},
        "sharing": {
            "publish_interval_s": 0.002, "whole_interval_s": 0.05, "silent_after_s": 0.5, "retry_interval_s": 0.02,
        },
        "quotas": {"slot_lease_s": 0.4, "retry_interval_s": 0.05, "deadline_s": 2.0},
        **config,
    }  # fmt: skip
    settings["routing"] = {"modes": ["remote_prefill"], **config.get("routing", {})}
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisProcess(folder))
        store = RedisStore(redis.url)
        stack.push_async_callback(store.close)
        network = FakeNetwork()
        prefills = [FakePrefillWorker(f"p{index}", network, store, CLUSTER) for index in range(num_prefills)]
        decodes = [FakeDecodeWorker(f"d{index}", network, store, CLUSTER) for index in range(num_decodes)]
        workers: list[FakePrefillWorker | FakeDecodeWorker] = [*prefills, *decodes]
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
        cluster = Gateways(checkpoint, settings, redis, store, network, prefills, decodes, stack)
        for _ in range(count):
            await cluster.add()
        yield cluster
