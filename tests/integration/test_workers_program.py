"""The workers as programs (``python -m prefill_workers``), with the trained model, over a real Redis."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerRecord, WorkerState, worker_key
from core.request import GenerateRequest, SamplingParams
from core.store_redis import RedisStore
from core.worker_main import main
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker
from protos import codec, worker_pb2
from tests.fake_model import run_to_end, token_ids
from tests.redis_process import RedisProcess
from tests.worker_pair import record_of, request
from tests.worker_stream import decode_stream, prefill_stream

MODEL = Path(__file__).parents[2] / "models" / "tiny"
PATIENCE_S = 60.0
CONFIG = f"""
model: {{path: {MODEL}, dtype: float32}}
engine: {{num_blocks: 128, max_batch_tokens: 32, num_threads: 1}}
"""
REQUESTS = [
    request("greedy", 50, SamplingParams(temperature=0.0, max_tokens=12)),
    request("seeded", 75, SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)),
]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path) as redis:
        yield redis


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def expected() -> dict[str, list[int]]:
    """What one engine alone says."""
    engine = Engine.load(
        ModelConfig(path=MODEL, dtype="float32"), EngineConfig(num_blocks=128, max_batch_tokens=512, num_threads=1)
    )
    for one in REQUESTS:
        engine.add(one)
    return {name: token_ids(outputs) for name, outputs in run_to_end(engine).items()}


def start_programs(config: Path, redis_url: str) -> "list[subprocess.Popen[str]]":
    common = ["--config", str(config), "--redis-url", redis_url, "--cluster", "test"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"{role}_workers", "--worker-id", worker_id, *common],
            stdout=subprocess.PIPE,
            text=True,
        )
        for role, worker_id in ((Role.PREFILL, "p0"), (Role.DECODE, "d0"))
    ]


async def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), PATIENCE_S)


async def registered(store: RedisStore, worker_id: str) -> WorkerRecord:
    """Wait for the record of a worker that is ready; it is written after the line is printed."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            record = await record_of(store, worker_id)
            if record.state is WorkerState.READY:
                return record
            await asyncio.sleep(0.02)  # the store has no watch


async def generate(one: GenerateRequest, prefill_address: str, decode_address: str) -> list[int]:
    name = one.request_id
    wire = codec.request_to_wire(one)
    async with prefill_stream(prefill_address, epoch=1) as to_prefill, decode_stream(decode_address, 1) as to_decode:
        await to_decode.send(submit=worker_pb2.DecodeSubmit(request=wire, transfer_id=name, lease_s=20.0))
        await to_decode.answer("accepted", name)
        submit = worker_pb2.PrefillSubmit(
            request=wire, transfer_id=name, decode_worker_id="d0", decode_epoch=1, decode_address=decode_address
        )
        await to_prefill.send(submit=submit)
        await to_decode.until_finished(name)
        await to_prefill.answer("handed_over", name)
        return token_ids(to_prefill.outputs(name) + to_decode.outputs(name))


@pytest.mark.slow
async def test_two_programs_serve_the_trained_model_and_leave_on_a_signal(redis: RedisProcess, tmp_path: Path) -> None:
    config = tmp_path / "worker.yaml"
    config.write_text(CONFIG)
    processes = start_programs(config, redis.url)
    store = RedisStore(redis.url)
    try:
        addresses = [(await first_line(process)).split()[-1] for process in processes]
        record = await registered(store, "d0")
        assert (record.epoch, record.address) == (Epoch(1), addresses[1])
        got = await asyncio.gather(*(generate(one, *addresses) for one in REQUESTS))
        assert dict(zip((one.request_id for one in REQUESTS), got, strict=True)) == expected()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
        left = await store.get(worker_key("test", WorkerId("d0")))  # None: its last lease has run out already
        assert left is None or WorkerRecord.model_validate_json(left).state is WorkerState.STOPPED
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait(PATIENCE_S)
            assert process.stdout is not None
            process.stdout.close()
        await store.close()


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize(
    ("config", "redis_url", "problem"),
    [
        ("model: {path: /nowhere}\nmodle: {}", "unix:///nowhere", "modle: unknown key"),
        ("model: {path: /nowhere}\nmax_requests: 0", "unix:///nowhere", "max_requests"),
        ("model: {path: /nowhere}", "http://nowhere", "redis"),
        ("model: {path: /nowhere}", "unix:///nowhere/redis.sock", "redis"),
        ("model: {path: /nowhere}", "", "/nowhere"),
    ],
    ids=["unknown key", "out of range", "no redis url", "no redis", "no model"],
)
@pytest.mark.parametrize("role", list(Role))
def test_what_cannot_work_is_one_line(
    role: Role,
    config: str,
    redis_url: str,
    problem: str,
    redis: RedisProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text(config)
    arguments = ["--config", str(path), "--worker-id", "w", "--redis-url", redis_url or redis.url]
    arguments += ["--log-level", "CRITICAL"]
    if role is Role.PREFILL:
        status = main(role, PrefillWorkerConfig, prefill_worker, arguments)
    else:
        status = main(role, DecodeWorkerConfig, decode_worker, arguments)
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m {role}_workers: ")
    assert problem in line.lower()
