"""A gateway as a process of its own, with access control, behind fake workers of this process: for tests that send what
no gateway should be harmed by, and then look at the process."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml

from cluster.redis_server import free_ports
from core.rpc import connect
from core.store_redis import RedisStore
from protos import inference_pb2_grpc
from router.access.keys import hash_of, new_key
from tests.fakes.checkpoint import write_checkpoint
from tests.fakes.cluster import text_request
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.prefill import FakePrefillWorker
from tests.fakes.reading import Reading
from tests.fakes.script import PATIENCE_S, FakeNetwork
from tests.issuer import AUDIENCE, ISSUER, Issuer
from tests.redis_process import RedisProcess

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = "doors"
TEXT = {"model": "fake", "prompt": "hello", "max_tokens": 5, "temperature": 0}
_START_S = 60.0


@dataclass
class GatewayDoors:
    """The process, and a good client of each door."""

    process: asyncio.subprocess.Process
    log: Path
    grpc_address: str
    http_address: str
    key: str
    issuer: Issuer
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    workers: list[FakePrefillWorker | FakeDecodeWorker] = field(default_factory=list)

    @property
    def authorization(self) -> str:
        return f"Bearer {self.key}"

    @property
    def submits(self) -> int:
        """How many requests came through to a worker."""
        return len(self.workers[0].submits)

    async def ask_well(self) -> None:
        """A good request at each door; both must be served, and rightly."""
        reply = await self.http.post("/v1/completions", json=TEXT)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == "abcde"
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        reading = Reading(stub.Generate(text_request(), metadata=[("authorization", self.authorization)]))
        await reading.read_all()
        assert reading.text == "abcde"

    async def ask_while(self, work: Awaitable[Any]) -> int:
        """Send good requests, one after the other, until `work` is done. Returns how many were served."""
        doing, num_served = asyncio.ensure_future(work), 0
        while True:
            await self.ask_well()
            num_served += 1
            if doing.done():
                doing.result()
                return num_served

    def peak_mib(self) -> float:
        """The most memory that the process had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = (await self.http.get("/metrics")).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the process tells nobody."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)


@asynccontextmanager
async def gateway_doors(folder: Path, **router: Any) -> AsyncIterator[GatewayDoors]:
    """Start everything; the process must still be there in the end, and stop as it should."""
    checkpoint = folder / "model"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    issuer, key, (http_port,) = Issuer(), new_key(), free_ports(1)
    (folder / "jwks.json").write_text(json.dumps(issuer.key_set()))
    access = {
        "enabled": True,
        "keys": [{"name": "good", "sha256": hash_of(key), "roles": ["inference", "admin"]}],
        "jwt": [{"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": str(folder / "jwks.json")}],
    }
    settings = {
        "port": 0, "model_path": str(checkpoint), "served_model_name": "fake", "access": access,
        "routing": {"modes": ["remote_prefill"]}, "mirror": {"poll_interval_s": 0.05}, **router,
        "http": {"port": http_port, **router.get("http", {})},
    }  # fmt: skip
    with RedisProcess(folder) as redis:
        config, log = folder / "gateway.yaml", folder / "gateway.log"
        config.write_text(yaml.safe_dump({"cluster": CLUSTER, "redis_url": redis.url, "router": settings}))
        store, network = RedisStore(redis.url), FakeNetwork()
        workers: list[FakePrefillWorker | FakeDecodeWorker] = [
            FakePrefillWorker("p0", network, store, CLUSTER),
            FakeDecodeWorker("d0", network, store, CLUSTER),
        ]
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router", "--config", str(config), cwd=ROOT, stdout=asyncio.subprocess.PIPE,
                stderr=sink,
            )  # fmt: skip
        try:
            for worker in workers:
                await worker.start()
            assert process.stdout is not None
            async with asyncio.timeout(_START_S):
                line = (await process.stdout.readline()).decode()
            assert line.startswith("listening on "), log.read_text()
            address, http_address = line.split()[-1], f"127.0.0.1:{http_port}"
            async with (
                connect(address) as channel,
                httpx.AsyncClient(
                    base_url=f"http://{http_address}",
                    timeout=PATIENCE_S,
                    trust_env=False,
                    headers={"authorization": f"Bearer {key}"},
                ) as http,
            ):
                doors = GatewayDoors(process, log, address, http_address, key, issuer, channel, http, workers)
                async with asyncio.timeout(PATIENCE_S):
                    while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110 - nothing to wait for
                        await asyncio.sleep(0.05)
                await doors.ask_well()
                yield doors
            assert process.returncode is None, log.read_text()
            process.terminate()
            async with asyncio.timeout(_START_S):
                await process.wait()
            assert process.returncode == 0, log.read_text()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            for worker in workers:
                await worker.kill()
            await store.close()
