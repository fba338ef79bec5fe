"""A cluster to measure gateways in: real gateway processes and a real Redis, both of which can be killed, in front of
paced workers of this process."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paced_roles import PacedDecode, PacedPrefill
from benchmarks.paced_worker import Floor, Pace, PacedWorker
from cluster.redis_server import EmbeddedRedis, RedisProcess
from core.ids import Epoch
from core.rpc import connect
from core.store_redis import RedisStore
from protos import admin_pb2, admin_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = "replicas"
_START_S = 90.0
_PATIENCE_S = 20.0
_LOOK_S = 0.02


@dataclass(slots=True)
class GatewayProcess:
    """One `python -m router`."""

    process: asyncio.subprocess.Process
    address: str
    listening_at: float

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        await self.process.wait()

    async def status(self) -> admin_pb2.GetClusterStatusResponse:
        async with connect(self.address) as channel:
            request = admin_pb2.GetClusterStatusRequest()
            return await admin_pb2_grpc.AdminStub(channel).GetClusterStatus(request, timeout=5.0)

    async def wait_connected(self, num_workers: int) -> float:
        """Wait until it has a stream to so many workers; return how long that was after it listened."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                if sum(one.connected for one in (await self.status()).workers) >= num_workers:
                    return asyncio.get_running_loop().time() - self.listening_at
                await asyncio.sleep(_LOOK_S)


@dataclass(slots=True)
class Bed:
    """What a run has."""

    folder: Path
    redis: EmbeddedRedis
    floor: Floor
    router: dict[str, Any]
    server: RedisProcess | None = None
    workers: list[PacedWorker] = field(default_factory=list)
    gateways: list[GatewayProcess] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def start_redis(self) -> None:
        self.server = await self.redis.spawn(Epoch(1))
        async with asyncio.timeout(_PATIENCE_S):
            await self.server.start()

    async def kill_redis(self) -> None:
        assert self.server is not None
        await self.server.kill()
        await self.server.ended()

    async def start_gateway(self) -> GatewayProcess:
        """Start one more, and wait until it listens."""
        config = self.folder / f"gateway-{next(self.numbers)}.yaml"
        settings = {"cluster": CLUSTER, "redis_url": self.redis.url, "log_level": "WARNING", "router": self.router}
        config.write_text(yaml.safe_dump(settings))
        with (self.folder / f"{config.stem}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router", "--config", str(config), cwd=ROOT, stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )  # fmt: skip
        assert process.stdout is not None
        async with asyncio.timeout(_START_S):
            line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the gateway did not start: {(self.folder / f'{config.stem}.log').read_text()}")
        gateway = GatewayProcess(process, line.split()[-1], asyncio.get_running_loop().time())
        self.gateways.append(gateway)
        return gateway

    async def stop(self) -> None:
        for gateway in self.gateways:
            await gateway.kill()
        for worker in self.workers:
            await worker.stop()
        if self.server is not None:
            await self.kill_redis()


@asynccontextmanager
async def bed(num_gateways: int, num_prefills: int, num_decodes: int, pace: Pace, **router: Any) -> AsyncIterator[Bed]:
    """Bring all up; everything is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="tandem-replicas-") as name:
        folder = Path(name)
        settings = {"port": 0, "model_path": str(ROOT / "models" / "tiny"), "request_timeout_s": 30.0, **router}
        one = Bed(folder, EmbeddedRedis(folder, max_memory_bytes=256 * 2**20), Floor(), settings)
        store: RedisStore | None = None
        try:
            await one.start_redis()
            store = RedisStore(one.redis.url)
            names: list[tuple[type[PacedPrefill | PacedDecode], str]] = [
                (PacedPrefill, f"p{n}") for n in range(num_prefills)
            ]
            names += [(PacedDecode, f"d{n}") for n in range(num_decodes)]
            for kind, worker_name in names:
                worker = kind(worker_name, one.floor, store, CLUSTER, pace)
                one.workers.append(worker)
                await worker.start()
            await asyncio.gather(*(one.start_gateway() for _ in range(num_gateways)))
            for gateway in one.gateways:
                await gateway.wait_connected(len(one.workers))
            yield one
        finally:
            await one.stop()
            if store is not None:
                await store.close()
