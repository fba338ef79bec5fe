"""The router's prefix index alone: a JSON line per result, a table on standard output.

- `hits`: the conversation trace through one index: hit ratio without bound and under a cap that keeps 1k, 10k and 50k
  blocks, and the published ratios. Needs ``--trace`` (or the folder in ``TANDEM_TRACES``).
- `speed`: prompts of 6k and 30k tokens in blocks of 16 and 512, at 8, 64 and 1,000 workers. Half of a prompt is one of
  64 shared contexts, the rest its own; every worker holds four of the contexts, `whole` or each `ragged` at a place of
  its own (so many workers, so many depths: the worst for the index). Per prompt: `match` (with the blocks by worker of
  both tiers), `predict`, `store` of what the worker then tells, `observe`. `match+insert/s` is one match and one store,
  as peers count it; `decision us` is what the index adds to a decision: match, predict and observe.
- `memory`: resident memory above the empty process, while prompts keep coming that share nothing with those before,
  workers restart, and predictions lapse. In a process of its own.
- `purge`: a worker dies in a full index: what `forget` takes, and each piece of the sweep.

    python -m benchmarks.router_index --trace ../shared/traces/mooncake_conversation.jsonl
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from core.ids import WorkerId
from core.kv_events import Tier
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots

_PUBLISHED = {300_000: 36.6, 1_000: 4.5, 10_000: 21.1, 50_000: 35.5}
_QUESTIONS = ("hits", "speed", "memory", "purge")
_STEPS = ("match", "predict", "store", "observe")
_SWEEP_ENTRIES = 50_000
_console = Console(width=140)
Result = dict[str, Any]
Hashes = tuple[bytes, ...]


def hits(options: argparse.Namespace) -> list[Result]:
    trace = options.trace
    if trace is None or not trace.is_file():
        print("hits: no trace given", file=sys.stderr)
        return []
    with trace.open(encoding="utf-8") as lines:
        prompts = [tuple(block.to_bytes(16, "little") for block in json.loads(line)["hash_ids"]) for line in lines]
    total = sum(map(len, prompts))
    results = []
    for num_blocks, published in _PUBLISHED.items():
        index = PrefixIndex(PrefixIndex.bytes_for(num_blocks), WorkerSlots())
        worker = WorkerId("w")
        found = 0
        began = time.perf_counter()
        for hashes in prompts:
            found += index.match(hashes).holders().get(worker, 0)
            index.store(worker, hashes)
        results.append(
            {
                "cap_bytes": PrefixIndex.bytes_for(num_blocks),
                "max_blocks": index.max_blocks,
                "blocks": len(index),
                "hit_percent": 100 * found / total,
                "published_percent": published,
                "prompts_per_s": len(prompts) / (time.perf_counter() - began),
            }
        )
    return results


def speed(options: argparse.Namespace) -> list[Result]:
    results = []
    for num_workers in options.workers:
        for num_tokens in (6_000, 30_000):
            for block_size, contexts in ((16, "whole"), (512, "whole"), (16, "ragged")):
                timings = _time_prompts(options, num_workers, num_tokens // block_size, contexts == "ragged")
                by_step = {step: sorted(timing[step] for timing in timings) for step in _STEPS}
                deciding = sorted(timing["match"] + timing["predict"] + timing["observe"] for timing in timings)
                inserting = statistics.fmean(timing["match"] + timing["store"] for timing in timings)
                result: Result = {"workers": num_workers, "tokens": num_tokens, "block_size": block_size}
                result["contexts"] = contexts
                result["match+insert/s"] = 1 / inserting
                result |= {f"{step} p50/p99 us": _percentiles(values) for step, values in by_step.items()}
                result["decision us"] = _percentiles(deciding)
                results.append(result)
    return results


def _time_prompts(
    options: argparse.Namespace, num_workers: int, num_blocks: int, is_ragged: bool
) -> list[dict[str, float]]:
    rng = random.Random(0)
    slots = WorkerSlots()
    index = PrefixIndex(options.cap_mib * 2**20, slots)
    workers = [WorkerId(f"w{number}") for number in range(num_workers)]
    shared = [_blocks(rng, num_blocks // 2) for _ in range(64)]
    for worker in workers:  # every worker holds part of some contexts
        for _ in range(4):
            context = rng.choice(shared)
            held = rng.randrange(len(context) // 2, len(context) + 1) if is_ragged else len(context)
            index.store(worker, context[:held])
    prompts_per_s = 3_750_000 / num_blocks / 16  # what the workers could compute, not what the index could match
    timings = []
    for number in range(options.prompts):
        hashes = rng.choice(shared) + _blocks(rng, num_blocks - num_blocks // 2)
        now = number / prompts_per_s
        worker = rng.choice(workers)
        started = time.perf_counter()
        match = index.match(hashes)
        match.blocks(Tier.DEVICE, slots.capacity)
        match.blocks(Tier.HOST, slots.capacity)
        matched = time.perf_counter()
        index.predict(worker, hashes, now, 5.0)
        predicted = time.perf_counter()
        index.store(worker, hashes)
        stored = time.perf_counter()
        index.observe(hashes, now)
        observed = time.perf_counter()
        index.expire(now)
        stamps = (started, matched, predicted, stored, observed)
        timings.append({step: stamps[at + 1] - stamps[at] for at, step in enumerate(_STEPS)})
    return timings[len(timings) // 10 :]


def memory(options: argparse.Namespace) -> list[Result]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_churn, (options.cap_mib, options.churn))


def _churn(cap_mib: int, num_capacities: int) -> list[Result]:
    rng = random.Random(0)
    PrefixIndex(2**20, WorkerSlots())  # compiles
    process = psutil.Process()
    empty = process.memory_info().rss
    slots = WorkerSlots()
    index = PrefixIndex(cap_mib * 2**20, slots)
    results = []
    number = 0
    for step in range(2 * num_capacities):
        for _ in range(index.max_blocks // 200):
            number += 1
            now = number * 1e-3
            hashes = _blocks(rng, 100)
            worker = WorkerId(f"w{number % 200}")
            index.observe(hashes, now)
            index.match(hashes)
            index.predict(worker, hashes, now, 5.0)
            if number % 10:
                index.store(worker, hashes)
            if number % 5_000 == 0:
                index.forget(worker)
            if number % 100 == 0:
                index.expire(now)
                index.sweep(_SWEEP_ENTRIES)
        results.append(
            {
                "cap_mib": cap_mib,
                "blocks_seen": number * 100,
                "capacities_seen": (step + 1) / 2,
                "blocks": len(index),
                "estimated_mib": index.num_bytes / 2**20,
                "resident_mib": (process.memory_info().rss - empty) / 2**20,
            }
        )
    index.check()
    return results


def purge(options: argparse.Namespace) -> list[Result]:
    rng = random.Random(0)
    index = PrefixIndex(options.cap_mib * 2**20, WorkerSlots())
    number = 0
    while len(index) < index.max_blocks - 1000:
        index.store(WorkerId(f"w{number % 50}"), _blocks(rng, 1000))
        number += 1
    results = []
    for dead in (1, 49):
        workers = [WorkerId(f"w{at}") for at in range(dead)]
        before = len(index)
        forget_s = statistics.median(_took(partial(index.forget, worker)) for worker in workers)
        pieces = []
        while True:
            pieces.append(_took(lambda: index.sweep(_SWEEP_ENTRIES)))
            if not index.sweep(0):
                break
        results.append(
            {
                "dead_workers": dead,
                "blocks_before": before,
                "blocks_after": len(index),
                "forget us": f"{forget_s * 1e6:.1f}",
                "pieces": len(pieces),
                "piece p50 ms": f"{statistics.median(pieces) * 1e3:.2f}",
                "piece max ms": f"{max(pieces) * 1e3:.2f}",
            }
        )
    return results


def _took(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _blocks(rng: random.Random, count: int) -> Hashes:
    packed = rng.randbytes(16 * count)
    return tuple(packed[at : at + 16] for at in range(0, 16 * count, 16))


def _percentiles(values: Sequence[float]) -> str:
    return f"{values[len(values) // 2] * 1e6:.0f}/{values[int(len(values) * 0.99)] * 1e6:.0f}"


def _report(question: str, results: Sequence[Result], output: Path | None) -> None:
    if not results:
        return
    table = Table(*results[0], title=question)
    for result in results:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value}" for value in result.values()))
        if output is not None:
            with output.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"question": question, **result}) + "\n")
    _console.print(table)


def main() -> None:
    folder = os.environ.get("TANDEM_TRACES")
    parser = argparse.ArgumentParser(description="Measure the prefix index.")
    parser.add_argument("questions", nargs="*", default=_QUESTIONS, help=f"of {', '.join(_QUESTIONS)}; default: all")
    parser.add_argument("--trace", type=Path, default=Path(folder) / "mooncake_conversation.jsonl" if folder else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--prompts", type=int, default=2000, help="per cell of `speed`")
    parser.add_argument("--cap-mib", type=int, default=64)
    parser.add_argument("--churn", type=int, default=6, help="capacities of new blocks that `memory` sends")
    parser.add_argument("--output", type=Path, help="file of JSON lines; appended to")
    options = parser.parse_args()
    for question in options.questions:
        if question not in _QUESTIONS:
            parser.error(f"no question {question!r}")
        _report(
            question,
            {"hits": hits, "speed": speed, "memory": memory, "purge": purge}[question](options),
            options.output,
        )


if __name__ == "__main__":
    main()
