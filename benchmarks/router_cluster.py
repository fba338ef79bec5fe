"""The real cluster on this machine under routing policies: time to first token and prefix hits. Nothing is simulated.

For every policy the whole cluster comes up (Ray actors, gateway, Redis, tandem-tiny), is warmed, and gets the same
requests at the same times (open loop, Poisson arrivals). Two workloads:

    prefix  every prompt begins with one of `--prefixes` long prefixes (Zipf), more than one worker's cache holds
    mixed   half of them, and half prompts of their own of all lengths

    python -m benchmarks.router_cluster

The order of the policies rotates from repetition to repetition. Prefill, decode, gateway and load share the machine's
cores, so absolute times mean little; compare the rows of one run.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.config import ClusterConfig
from cluster.demo.run import model_path
from cluster.launcher import launcher_of
from cluster.progress import LineProgress
from core.config import parse_config
from core.errors import ServingError
from tandem_client import Client

_VOCABULARY = range(100, 4000)
_DEADLINE_S = 60.0
_WARM_REQUESTS = 24


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one request; `ttft_s` as the client saw it."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One policy under one workload, once. Seconds."""

    policy: str
    workload: str
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    hit_ratio: float
    failures: int


def make_arrivals(workload: str, options: argparse.Namespace, seed: int) -> list[Arrival]:
    """Return the same requests for the same seed. Pure."""
    draw = random.Random(f"{workload} {seed}")
    prefixes = [draw.choices(_VOCABULARY, k=options.prefix_tokens) for _ in range(options.prefixes)]
    weights = [1.0 / rank for rank in range(1, options.prefixes + 1)]
    at_s, arrivals = 0.0, []
    for _ in range(options.requests):
        at_s += draw.expovariate(options.rate)
        is_own = workload == "mixed" and draw.random() < 0.5
        head = [] if is_own else draw.choices(prefixes, weights)[0]
        length = draw.randint(100, options.prefix_tokens) if is_own else draw.randint(16, 128)
        arrivals.append(Arrival(at_s, (*head, *draw.choices(_VOCABULARY, k=length))))
    return arrivals


def cluster_config(policy: str, options: argparse.Namespace) -> ClusterConfig:
    pool = {"replicas": 2, "engine": {"kv_cache_bytes": options.cache_mib * 2**20, "max_batch_tokens": 256}}
    data = {
        "name": "router-benchmark",
        "model": {"path": model_path(), "dtype": "float32", "served_name": "tandem-tiny"},
        "prefill": pool,
        "decode": pool,
        "transfer": {"profiles": "none"},
        "router": {"port": 0, "routing": {"policy": policy}},
        "supervision": {"worker_start_deadline_s": 180.0},
        "log_level": "WARNING",
    }
    return parse_config(ClusterConfig, data, source="router benchmark")


async def replay(client: Client, arrivals: Sequence[Arrival]) -> tuple[list[Outcome], int]:
    """Send every request at its time, whatever became of those before. Returns outcomes, and how many failed."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    outcomes: list[Outcome] = []
    failures = 0

    async def one(arrival: Arrival) -> None:
        nonlocal failures
        await asyncio.sleep(max(0.0, begun + arrival.at_s - loop.time()))
        sent = loop.time()
        try:
            done = await client.generate_text(
                list(arrival.prompt), deadline_s=_DEADLINE_S, temperature=0.0, max_tokens=16, ignore_eos=True
            )
        except ServingError:
            failures += 1
            return
        usage, timing = done.summary.usage, done.summary.timing
        on_the_way_s = loop.time() - sent - timing.total_s
        outcomes.append(Outcome(timing.ttft_s + max(0.0, on_the_way_s), usage.prompt_tokens, usage.cached_tokens))

    await asyncio.gather(*(one(arrival) for arrival in arrivals))
    return outcomes, failures


def row_of(policy: str, workload: str, outcomes: Sequence[Outcome], failures: int) -> Row:
    """Pure."""
    times = sorted(outcome.ttft_s for outcome in outcomes)
    hits = sum(outcome.cached_tokens for outcome in outcomes) / sum(outcome.prompt_tokens for outcome in outcomes)
    tail = times[min(len(times) - 1, int(len(times) * 0.99))]
    return Row(policy, workload, statistics.fmean(times), statistics.median(times), tail, hits, failures)


async def run_policy(policy: str, options: argparse.Namespace, seed: int, console: Console) -> list[Row]:
    rows = []
    progress = LineProgress(lambda line: None)
    async with launcher_of(cluster_config(policy, options), progress) as launcher:
        await launcher.up()
        async with Client(launcher.gateway_address) as client:
            for workload in options.workloads:
                arrivals = make_arrivals(workload, options, seed)
                await replay(client, [Arrival(0.0, one.prompt[:64]) for one in arrivals[:_WARM_REQUESTS]])
                rows.append(row_of(policy, workload, *await replay(client, arrivals)))
                console.print(f"[dim]{rows[-1]}")
        await launcher.down()
    return rows


async def run(options: argparse.Namespace) -> None:
    console = Console(width=120)
    rows: list[Row] = []
    for repetition in range(options.repetitions):
        rotation = itertools.islice(itertools.cycle(options.policies), repetition, repetition + len(options.policies))
        for policy in rotation:
            rows += await run_policy(policy, options, repetition, console)
    table = Table("workload", "policy", "TTFT mean ms", "p50 ms", "p99 ms", "prefix hits", "failed")
    for workload in options.workloads:
        for policy in options.policies:
            mine = [row for row in rows if (row.workload, row.policy) == (workload, policy)]
            times = (
                [row.ttft_mean_s for row in mine],
                [row.ttft_p50_s for row in mine],
                [row.ttft_p99_s for row in mine],
            )
            hits = statistics.median(row.hit_ratio for row in mine)
            failures = sum(row.failures for row in mine)
            milliseconds = (f"{statistics.median(values) * 1e3:.1f}" for values in times)
            table.add_row(workload, policy, *milliseconds, f"{hits:.1%}", f"{failures}")
    console.print(table)
    _write(options, rows)


def _write(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_after": os.getloadavg()[0],
        "rate": options.rate,
        "requests": options.requests,
    }
    with options.out.open("a", encoding="utf-8") as out:
        for row in rows:
            values = {name: getattr(row, name) for name in Row.__slots__}
            out.write(json.dumps({**facts, **values}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["cost", "round_robin", "least_loaded"])
    parser.add_argument("--workloads", nargs="+", choices=["prefix", "mixed"], default=["prefix", "mixed"])
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=250, help="per workload")
    parser.add_argument("--prefixes", type=int, default=24)
    parser.add_argument("--prefix-tokens", type=int, default=1200)
    parser.add_argument("--cache-mib", type=int, default=64, help="KV cache of one worker")
    parser.add_argument("--repetitions", type=int, default=2)
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/router_cluster_{today}.jsonl"))
    Path("benchmarks/results").mkdir(exist_ok=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
