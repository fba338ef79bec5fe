"""The sides of the router comparison: each starts a router with its trivial workers, and has prompts sent through it.

Every side answers the same questions: how many prompts were served, by which worker, with how many hits, and what CPU
time and memory the router itself (not its workers, not the load) took for it.
"""

import asyncio
import contextlib
import json
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.lru_worker import WorkerShape
from benchmarks.router_peers_grpc import CLUSTER, MAX_MODEL_LEN
from cluster.redis_server import EmbeddedRedis
from core.ids import Epoch

_ROOT = Path(__file__).resolve().parent.parent
_HTTP = ("-m", "benchmarks.router_peers_http")  # it imports nothing that the peers' environment has not
_START_LIMIT_S = 60.0
_RUN_LIMIT_S = 600.0
_SETTLE_S = 3.0  # until routers have found their workers well
_REDIS_BYTES = 1 << 30


class SideFailed(Exception):
    """A router or its workers did not start, or did not answer. One line."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of prompts through one router. Times in seconds, memory in bytes.

    Attributes:
        router_cpu_s: user and system time of the router's process tree during the run.
        rss_before, rss_after: resident memory of it.
        requests, computed: per worker: prompts, and blocks that were not found in its cache.
    """

    done: int
    failures: dict[str, int]
    wall_s: float
    p50_s: float
    p99_s: float
    router_cpu_s: float
    rss_before: int
    rss_after: int
    requests: tuple[int, ...]
    computed: tuple[int, ...]
    hit_ratio: float

    def row(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Side:
    """A running router: `send` passes prompts (lists of block numbers) through it at a concurrency."""

    name: str
    router_pid: int
    load: Sequence[str]
    counts: "Counter"

    async def send(self, prompts: Sequence[Sequence[int]], concurrency: int) -> Measured:
        before = await self.counts.read()
        router = psutil.Process(self.router_pid)
        cpu_before, rss_before = _usage(router)
        lines = "".join(json.dumps(list(prompt)) + "\n" for prompt in prompts)
        process = await asyncio.create_subprocess_exec(
            *self.load, "--concurrency", str(concurrency),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=_ROOT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_RUN_LIMIT_S):
                out, _ = await process.communicate(lines.encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise SideFailed(f"{self.name}: the load did not end within {_RUN_LIMIT_S:g} s") from None
        if process.returncode:
            raise SideFailed(f"{self.name}: the load ended with {process.returncode}")
        cpu_after, rss_after = _usage(router)
        told = json.loads(out.splitlines()[-1])
        if not told["done"]:
            raise SideFailed(f"{self.name}: nothing was served: {told['failures']}")
        after = await self.counts.read()
        change = [{key: b[key] - a[key] for key in b} for a, b in zip(before, after, strict=True)]
        blocks = sum(one["blocks"] for one in change)
        return Measured(
            **told,
            router_cpu_s=cpu_after - cpu_before,
            rss_before=rss_before,
            rss_after=rss_after,
            requests=tuple(one["requests"] for one in change),
            computed=tuple(one["blocks"] - one["hits"] for one in change),
            hit_ratio=sum(one["hits"] for one in change) / max(1, blocks),
        )


class Counter:
    """Asks workers for their counts by a line to a process of theirs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def read(self) -> list[dict[str, int]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        async with asyncio.timeout(_START_LIMIT_S):
            counts: list[dict[str, int]] = json.loads(await self._process.stdout.readline())
        return counts


@contextlib.asynccontextmanager
async def tandem(
    count: int, shape: WorkerShape, model: Path, policy: str = "cost", **routing: object
) -> AsyncIterator[Side]:
    """Our gateway as its own process, with a real Redis and trivial gRPC workers. `routing`: more of that section."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = EmbeddedRedis(folder, max_memory_bytes=_REDIS_BYTES)
        redis = await server.spawn(Epoch(1))
        stack.push_async_callback(_end, redis.ended, redis.kill)
        await redis.start()
        workers = await _started(
            stack, sys.executable, "-m", "benchmarks.router_peers_grpc", "workers", "--redis-url", server.url,
            "--count", str(count), *_shape_arguments(shape), word="ready",
        )  # fmt: skip
        config = {
            "cluster": CLUSTER,
            "redis_url": server.url,
            "log_level": "WARNING",
            "router": {
                "port": 0,
                "model_path": str(_long_model(model, folder)),
                "routing": {"policy": policy, **routing},
                "max_queued_tokens": 100_000_000,
            },
        }
        path = folder / "gateway.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        router = await _spawn(stack, sys.executable, "-m", "router", "--config", str(path))
        address = (await _line(router, "our gateway")).split()[-1]
        await asyncio.sleep(_SETTLE_S)
        load = (sys.executable, "-m", "benchmarks.router_peers_grpc", "load", "--address", address)
        yield Side(f"tandem {policy}", router.pid, load, Counter(workers))


@contextlib.asynccontextmanager
async def http_router(
    name: str, python: Path, command: Sequence[str], count: int, shape: WorkerShape, policy: str
) -> AsyncIterator[Side]:
    """A router that takes `--worker-urls`, with trivial HTTP workers."""
    async with contextlib.AsyncExitStack() as stack:
        first = _free_ports(count + 2)
        ports = range(first + 2, first + 2 + count)
        workers = await _started(
            stack, str(python), *_HTTP, "workers", "--ports", f"{ports[0]}-{ports[-1]}",
            *_shape_arguments(shape), word="ready",
        )  # fmt: skip
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        log_level = "error"
        router = await _spawn(
            stack, *command, "--worker-urls", *urls, "--policy", policy, "--host", "127.0.0.1", "--port", str(first),
            "--prometheus-port", str(first + 1), "--log-level", log_level,
        )  # fmt: skip
        assert router.stdout is not None
        draining = asyncio.create_task(_drain(router.stdout))  # what it prints must not block it
        stack.callback(draining.cancel)
        await _until_open(first, router)
        await asyncio.sleep(_SETTLE_S)
        load = (str(python), *_HTTP, "load", "--url", f"http://127.0.0.1:{first}/v1/completions")
        yield Side(f"{name} {policy}", router.pid, load, Counter(workers))


def _shape_arguments(shape: WorkerShape) -> list[str]:
    values = {
        "--cache-blocks": shape.cache_blocks,
        "--request-ms": shape.request_s * 1e3,
        "--block-ms": shape.block_s * 1e3,
    }
    return [word for name, value in values.items() for word in (name, str(value))]


def _long_model(model: Path, folder: Path) -> Path:
    """The model's tokenizer beside a configuration of a longer context: the gateway needs no weights."""
    long = folder / "model"
    long.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (long / name).write_bytes((model / name).read_bytes())
    facts = json.loads((model / "config.json").read_text(encoding="utf-8"))
    facts["max_position_embeddings"] = MAX_MODEL_LEN
    (long / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return long


def _usage(process: psutil.Process) -> tuple[float, int]:
    family = [process, *process.children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(one.user + one.system for one in times), sum(one.memory_info().rss for one in family)


async def _spawn(stack: contextlib.AsyncExitStack, *command: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=_ROOT
    )

    async def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    stack.push_async_callback(_end, process.wait, kill)
    return process


async def _started(stack: contextlib.AsyncExitStack, *command: str, word: str) -> asyncio.subprocess.Process:
    process = await _spawn(stack, *command)
    said = await _line(process, command[-1])
    if said != word:
        raise SideFailed(f"{' '.join(command[:4])} said {said!r} instead of {word!r}")
    return process


async def _line(process: asyncio.subprocess.Process, name: str) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_LIMIT_S):
            line = await process.stdout.readline()
    except TimeoutError:
        raise SideFailed(f"{name} did not start within {_START_LIMIT_S:g} s") from None
    if not line:
        raise SideFailed(f"{name} ended with {await process.wait()}")
    return line.decode().strip()


async def _until_open(port: int, process: asyncio.subprocess.Process) -> None:
    """Wait until somebody listens."""
    async with asyncio.timeout(_START_LIMIT_S):
        while process.returncode is None:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.1)
    raise SideFailed(f"the router ended with {process.returncode}")


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


async def _end(ended: Callable[[], Awaitable[object]], kill: Callable[[], Awaitable[object]]) -> None:
    await kill()
    await ended()


def _free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody uses at the moment."""
    for first in range(21_000, 32_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise SideFailed(f"no {count} free ports in a row")
