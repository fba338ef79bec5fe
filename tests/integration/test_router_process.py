"""`python -m router` as a process of its own, with a real Redis that goes away and comes back."""

import asyncio
import signal
import sys
from pathlib import Path

import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.rpc import connect
from core.store_redis import RedisStore
from tandem_client import Client
from tests.fakes.checkpoint import write_checkpoint
from tests.fakes.decode import FakeDecodeWorker
from tests.fakes.prefill import FakePrefillWorker
from tests.fakes.script import PATIENCE_S, FakeNetwork
from tests.redis_process import RedisProcess

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 60.0


async def start(config: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "router",
        "--config",
        str(config),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def wait_serving(address: str) -> None:
    channel = connect(address)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
    async with asyncio.timeout(PATIENCE_S):
        async for reply in watch:
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                break
    watch.cancel()
    await channel.close()


async def test_serves_drains_on_sigterm_and_outlives_redis(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    with RedisProcess(tmp_path) as redis:
        router = {"port": 0, "model_path": str(checkpoint), "mirror": {"poll_interval_s": 0.05}}
        config = tmp_path / "gateway.yaml"
        config.write_text(yaml.safe_dump({"cluster": "proc", "redis_url": redis.url, "router": router}))
        process = await start(config)
        store = RedisStore(redis.url)
        network = FakeNetwork()
        workers: list[FakePrefillWorker | FakeDecodeWorker] = [
            FakePrefillWorker("p0", network, store, "proc"),
            FakeDecodeWorker("d0", network, store, "proc"),
        ]
        try:
            for worker in workers:
                await worker.start()
            assert process.stdout is not None
            async with asyncio.timeout(START_S):
                line = (await process.stdout.readline()).decode()
            assert line.startswith("listening on "), line
            address = line.split()[-1]
            await wait_serving(address)
            async with Client(address) as client:
                assert (await client.generate_text("hello", max_tokens=3, temperature=0.0)).text == "abc"
                redis.kill()
                assert (await client.generate_text("hello", max_tokens=3, temperature=0.0)).text == "abc"
                redis.start()
                assert (await client.generate_text("hello", max_tokens=3, temperature=0.0)).text == "abc"
            process.send_signal(signal.SIGTERM)
            _, errors = await asyncio.wait_for(process.communicate(), PATIENCE_S)
            assert process.returncode == 0, errors.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
            for worker in workers:
                await worker.kill()
            await store.close()


async def test_a_bad_configuration_is_one_line_and_exit_1(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text("router:\n  model_path: nowhere\n  routing:\n    temprature: 1\n")
    process = await start(config)
    out, errors = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode == 1
    assert out == b""
    assert errors.decode().splitlines() == [f"error: {config}: router.routing.temprature: unknown key"]
