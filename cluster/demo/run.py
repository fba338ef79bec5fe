"""`tandem demo`: a whole cluster on this machine for a minute, at work, and its own judge.

1. Two prefill and two decode workers come up as Ray actors, with a gateway and an embedded Redis, on tandem-tiny.
2. Two waves of concurrent requests stream; every text is printed as it ends.
3. Everything goes down; tables tell where the time went, and every promise is checked. Exit code 1 if one is broken.
"""

import asyncio
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cluster.config import ClusterConfig
from cluster.demo.memory import MemoryWatch
from cluster.demo.report import DemoTotals, placement_table, problems, request_table, totals_table
from cluster.demo.traffic import WAVES, DemoRequest
from cluster.launcher import Launcher, launcher_of
from cluster.preflight import packages_folder
from cluster.progress import LineProgress, LiveProgress, Progress
from cluster.workspace import marked_processes
from core.config import parse_config
from core.errors import ConfigError, ServingError
from tandem_client import Client, Generation

_REQUEST_S = 120.0


def demo_config(model: Path) -> ClusterConfig:
    """Return a small cluster: float32, so that equal requests give equal tokens on every path."""
    pool = {"replicas": 2, "engine": {"kv_cache_bytes": 32 * 2**20, "max_batch_tokens": 256}}
    data = {
        "name": "demo",
        "model": {"path": model, "dtype": "float32", "served_name": "tandem-tiny"},
        "prefill": pool,
        "decode": pool,
        "transfer": {"profiles": "none"},  # those of the model were validated in its own bfloat16
        "router": {"port": 0},
        "supervision": {"worker_start_deadline_s": 180.0},
        "log_level": "WARNING",
    }
    return parse_config(ClusterConfig, data, source="demo")


def model_path() -> Path:
    """Return tandem-tiny's folder.

    Raises:
        ConfigError: this installation does not carry the model.
    """
    path = packages_folder() / "models" / "tiny"
    if not (path / "config.json").is_file():
        raise ConfigError(f"the demo needs tandem-tiny at {path}: run it from a checkout of the repository")
    return path


async def run_demo(console: Console) -> int:
    """Return the exit code.

    Raises:
        ServingError: the cluster did not come up, or a request failed; nothing is left running.
    """
    live = LiveProgress(console) if console.is_terminal else None
    progress: Progress = live or LineProgress(lambda line: console.print(escape(line), highlight=False))
    began = time.monotonic()
    async with launcher_of(demo_config(model_path()), progress) as launcher, MemoryWatch(launcher.mark) as memory:
        with live or nullcontext():
            await launcher.up()
        up = time.monotonic()
        pids = {status.name: status.pid for status in launcher.status()}
        console.print(f"\n[bold]up in {up - began:.1f} s:[/] {len(pids)} services: {', '.join(pids)}")
        console.print(f"OpenAI's API is at {launcher.http_urls}\n")
        results = await _serve(console, launcher)
        served = time.monotonic()
        await launcher.down()
        mark = launcher.mark
    ended = time.monotonic()
    found = [*problems(results)]
    if len(set(pids.values())) != len(pids):
        found.append("two services shared a process")
    left = marked_processes(mark)
    if left:
        found.append(f"processes were left running: {', '.join(str(process.pid) for process in left)}")
    totals = DemoTotals(up - began, served - up, ended - served, memory.peak_bytes, memory.num_processes)
    console.print(request_table(results))
    console.print(placement_table(results))
    console.print(totals_table(results, totals))
    for problem in found:
        console.print(f"[red]broken:[/] {escape(problem)}")
    if not found:
        console.print(
            "[green]all held:[/] contiguous streams, repeatable tokens, modes that keep their word, a clean end"
        )
    return 1 if found else 0


async def _serve(console: Console, launcher: Launcher) -> dict[str, Generation]:
    results: dict[str, Generation] = {}

    async def one(client: Client, request: DemoRequest) -> None:
        try:
            result = await client.generate_text(request.prompt, deadline_s=_REQUEST_S, **request.sampling)
        except ServingError as error:
            raise ServingError(f"request {request.name} failed: {error}") from error
        results[request.name] = result
        asked = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content
        console.print(f"[bold cyan]{request.name}[/] [dim]{escape(_tail(asked))}[/]{escape(result.text)}\n")

    async with Client(launcher.gateway_address) as client:
        for number, wave in enumerate(WAVES, start=1):
            console.rule(f"wave {number}: {len(wave)} concurrent requests")
            tasks = [asyncio.create_task(one(client, request)) for request in wave]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
    return {request.name: results[request.name] for wave in WAVES for request in wave}


def _tail(text: str, length: int = 48) -> str:
    flat = " ".join(text.split())
    return (flat if len(flat) <= length else f"...{flat[-length:]}") + " "
