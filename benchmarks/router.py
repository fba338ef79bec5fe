"""Our router against those that install from the package index, in one run, on the same trace and workers.

Four questions, each a table:

    hits    The trace over 4 workers with LRU caches at concurrency 16, large and small caches: hit ratio against the
            ceiling (one cache as large as all four together), and how evenly the work fell.
    decide  The choice alone, in one process, on the prompts of the trace: our whole decision (match, load, cost of all
            pairs and modes, explanation, prediction, credit) against Ray Serve's prefix tree (match and insert, no
            load term, no actor around it). Per second, p50, p99, growth of resident memory.
    wire    Prompts through a router in front of workers that answer at once: requests per second of the router's own
            CPU time, since load and workers share the machine with it.
    memory  Resident memory of the routers while prompts keep coming that share nothing. Our index may take 16 MiB,
            which the first round fills; the others have their own defaults.

    python -m benchmarks.router --trace ../shared/traces/mooncake_conversation.jsonl

A block of the trace (512 tokens) is 16 tokens for us and 64 characters for routers that look at text: the structure is
the trace's, the bytes are fewer for everybody. Peers: sglang-router 0.3.2 and vllm-router 0.1.17 (HTTP, cache_aware,
their defaults), Ray Serve 2.60's prefix tree. The results are appended to a file of JSON lines.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lru_worker import WorkerShape
from benchmarks.router_peers_sides import Measured, Side, SideFailed, http_router, tandem
from benchmarks.router_peers_venv import PeersUnavailable, peers_python

_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny"
_PARTS = ["hits", "decide", "wire", "memory"]
_CHURN_BLOCKS = 24  # of a prompt that shares nothing: as many as the trace's prompts have in the mean
_CHURNED_INDEX_BYTES = 16 * 2**20
_IDLE = WorkerShape(cache_blocks=1_000_000, request_s=0.0, block_s=0.0)


def read_prompts(path: Path) -> list[list[int]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def ceiling(prompts: Sequence[Sequence[int]], cache_blocks: int) -> float:
    """Hit ratio of one LRU cache of this size that sees every prompt. Pure."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for prompt in prompts:
        total += len(prompt)
        hits += next((depth for depth, block in enumerate(prompt) if block not in cache), len(prompt))
        for block in reversed(prompt):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > cache_blocks:
            cache.popitem(last=False)
    return hits / total


def unevenness(values: Sequence[int]) -> float:
    """The busiest worker's share over the mean share; 1 is even. Pure."""
    return max(values) / statistics.fmean(values) if any(values) else 1.0


def churn(num_prompts: int, first: int) -> list[list[int]]:
    """Prompts of which no two share a block. Pure."""
    return [
        [1_000_000 + (first + number) * _CHURN_BLOCKS + depth for depth in range(_CHURN_BLOCKS)]
        for number in range(num_prompts)
    ]


class Comparison:
    """One run of the program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._console = Console(width=120)
        try:
            self._python: Path | None = peers_python() if options.peers else None
        except PeersUnavailable as error:
            sys.exit(f"peers: {error}")
        self._facts = {
            "commit": _commit(),
            "machine": f"{os.cpu_count()} x {_cpu()}",
            "python": platform.python_version(),
            "load_before": os.getloadavg()[0],
        }

    async def run(self) -> None:
        prompts = read_prompts(self._options.trace)[: self._options.prompts]
        for part in self._options.parts:
            await getattr(self, f"_{part}")(prompts)

    def _sides(self, count: int, shape: WorkerShape, **routing: object) -> list[AbstractAsyncContextManager[Side]]:
        sides: list[AbstractAsyncContextManager[Side]] = []
        sides += [tandem(count, shape, _MODEL, policy, **routing) for policy in self._options.policies]
        if self._python is not None:
            folder = self._python.parent
            vllm, sglang = [str(folder / "vllm-router")], [str(folder / "sglang-router"), "launch"]
            sides.append(http_router("sglang-router", self._python, sglang, count, shape, "cache_aware"))
            sides.append(http_router("vllm-router", self._python, vllm, count, shape, "cache_aware"))
            sides.append(http_router("sglang-router", self._python, sglang, count, shape, "round_robin"))
        return sides

    async def _each(
        self, count: int, shape: WorkerShape, measure: Callable[[Side], Awaitable[None]], **routing: object
    ) -> None:
        """Have every side measured in turn; one that fails is told of and left out."""
        for opening in self._sides(count, shape, **routing):
            try:
                async with opening as side:
                    await measure(side)
            except SideFailed as error:
                self._console.print(f"[red]{error}")

    async def _hits(self, prompts: Sequence[Sequence[int]]) -> None:
        options = self._options
        table = Table(
            "cache blocks", "router", "hit ratio", "ceiling", "requests max/mean", "computed max/mean", "p50 ms"
        )
        for cache_blocks in options.caches:
            shape = WorkerShape(cache_blocks, request_s=0.0005, block_s=options.block_ms / 1e3)
            best = ceiling(prompts, cache_blocks * 4)

            async def measure(side: Side, cache_blocks: int = cache_blocks, best: float = best) -> None:
                measured = await side.send(prompts, 16)
                even = (unevenness(measured.requests), unevenness(measured.computed))
                self._record("hits", side, measured, cache_blocks=cache_blocks, ceiling=best)
                table.add_row(
                    f"{cache_blocks}", side.name, f"{measured.hit_ratio:.2%}", f"{best:.2%}", f"{even[0]:.3f}",
                    f"{even[1]:.3f}", f"{measured.p50_s * 1e3:.1f}",
                )  # fmt: skip

            await self._each(4, shape, measure)
        self._console.print(table)

    async def _decide(self, prompts: Sequence[Sequence[int]]) -> None:
        table = Table("workers", "who decides", "decisions/s", "p50 us", "p99 us", "MiB grown")
        for count in self._options.workers:
            told = await asyncio.to_thread(self._ours, count)
            self._decided(table, "tandem", count, told)
            if self._python is not None:
                for name, more in (("ray tree", ()), ("ray tree, evicting", ("--max-chars", "400000"))):
                    self._decided(table, name, count, await asyncio.to_thread(self._tree, prompts, count, more))
        self._console.print(table)

    def _decided(self, table: Table, name: str, count: int, told: dict[str, float]) -> None:
        self._write({"part": "decide", "router": name, "workers": count, **told})
        numbers = (told["decisions_per_s"], told["p50_s"] * 1e6, told["p99_s"] * 1e6, told["rss_growth"] / 2**20)
        table.add_row(f"{count}", name, *(f"{number:,.0f}" for number in numbers))

    def _ours(self, count: int) -> dict[str, float]:
        """In a process of its own, so that its memory can be told."""
        options = self._options
        command = [
            sys.executable, "-m", "benchmarks.router_trace_decisions", "--workers", str(count), "--trace",
            str(options.trace), "--prompts", str(options.decide_prompts),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return told

    def _tree(self, prompts: Sequence[Sequence[int]], count: int, more: Sequence[str]) -> dict[str, float]:
        lines = "".join(json.dumps(list(prompt)) + "\n" for prompt in prompts[: self._options.decide_prompts])
        command = [str(self._python), "-m", "benchmarks.router_peers_tree", "--workers", str(count), *more]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=600, check=True)
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return told

    async def _wire(self, prompts: Sequence[Sequence[int]]) -> None:
        table = Table("workers", "router", "req/s of wall", "req/s of its CPU", "CPU us/req", "p99 ms", "failures")
        for count in self._options.wire_workers:

            async def measure(side: Side, count: int = count) -> None:
                await side.send(prompts[:200], 32)  # warm
                measured = await side.send(prompts[: self._options.wire_prompts], 32)
                self._record("wire", side, measured, workers=count)
                table.add_row(
                    f"{count}", side.name, f"{measured.done / measured.wall_s:,.0f}",
                    f"{measured.done / measured.router_cpu_s:,.0f}",
                    f"{measured.router_cpu_s / measured.done * 1e6:,.0f}", f"{measured.p99_s * 1e3:.1f}",
                    f"{sum(measured.failures.values())}",
                )  # fmt: skip

            await self._each(count, _IDLE, measure)
        self._console.print(table)

    async def _memory(self, prompts: Sequence[Sequence[int]]) -> None:
        rounds, size = self._options.churn_rounds, self._options.churn_prompts
        table = Table("router", *(f"MiB after {size * (number + 1):,}" for number in range(rounds)))

        async def measure(side: Side) -> None:
            seen = []
            for number in range(rounds):
                measured = await side.send(churn(size, number * size), 32)
                seen.append(measured.rss_after)
                self._record("memory", side, measured, round=number)
            table.add_row(side.name, *(f"{rss / 2**20:,.0f}" for rss in seen))

        await self._each(8, WorkerShape(2_000, 0.0, 0.0), measure, prefix_index_bytes=_CHURNED_INDEX_BYTES)
        self._console.print(table)

    def _record(self, part: str, side: Side, measured: Measured, **facts: object) -> None:
        self._write({"part": part, "router": side.name, **facts, **measured.row()})

    def _write(self, row: dict[str, Any]) -> None:
        row = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **self._facts, **row}
        with self._options.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    return names[0].split(":")[1].strip() if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="of Mooncake: JSON lines with hash_ids")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--policies", nargs="+", default=["cost"], help="of our router")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--prompts", type=int, default=12_031, help="of the trace, for the hits")
    parser.add_argument("--caches", type=int, nargs="+", default=[50_000, 2_500], help="blocks per worker")
    parser.add_argument("--block-ms", type=float, default=0.25, help="time per block computed")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 1000], help="of the choice alone")
    parser.add_argument("--decide-prompts", type=int, default=5_000)
    parser.add_argument("--wire-workers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--wire-prompts", type=int, default=3_000)
    parser.add_argument("--churn-prompts", type=int, default=5_000, help="per round")
    parser.add_argument("--churn-rounds", type=int, default=4)
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/router_{today}.jsonl"))
    asyncio.run(Comparison(parser.parse_args()).run())


if __name__ == "__main__":
    main()
