"""Whole decisions of the router on one core: a JSON line per result, a table on standard output.

A whole decision is what the dispatcher does with a prompt whose block hashes are known: note its arrival in the prefix
index, match it, choose (prefill worker, decode worker, mode) by the cost with the next best for the conditional bounds,
remember the explanation, predict its blocks, and count it as credit of both workers. As many requests end as begin, and
every worker reports its load once per second of the arrivals' own time.

Half of a prompt is one of 64 shared contexts, the rest its own; every worker holds four of the contexts. Half of the
workers are prefill workers. Blocks of 16 tokens, and of 512 for comparison with systems that hash in such pieces.

    python -m benchmarks.router_decisions --workers 8 64 1000 --tokens 6000 30000
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from rich.console import Console
from rich.table import Table

from core.ids import Epoch, RequestId, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from core.request import GenerateRequest, SamplingParams
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots
from router.prompt_hashes import HashKey, PromptHashes
from router.routing.config import RoutingConfig
from router.routing.credit import CreditLedger
from router.routing.decision import Decision
from router.routing.models import Models
from router.routing.placer import Placer
from router.routing.table import WorkerTable

Prompt = tuple[tuple[bytes, ...], int]
"""Block hashes, and how many tokens."""
_STEPS = ("observe", "place", "predict", "credit")
_PREDICTED_S = 5.0
_IN_FLIGHT_PER_WORKER = 8
_console = Console(width=140)


class _Clock:
    """Time of the arrivals."""

    def __init__(self) -> None:
        self.at = 1.0

    def now(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.at += seconds


class Deciding:
    """The parts of a gateway that decide, before workers that only exist as records. Half of them are prefill workers.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, num_workers: int, block_size: int, cap_mib: int, rng: random.Random) -> None:
        config = RoutingConfig(prefix_index_bytes=cap_mib * 2**20)
        self.clock, self.rng, self.key = _Clock(), rng, HashKey("weights", block_size)
        slots = WorkerSlots()
        self.table = WorkerTable(config, slots)
        self.index = PrefixIndex(config.prefix_index_bytes, slots)
        self.models = Models(config, self.table, self.clock)
        self.credit = CreditLedger(config, self.table)
        self.placer = Placer(config, self.clock, rng, self.table, self.models.links, self.index, staleness=lambda: 0.0)
        self.workers = [WorkerId(f"w{number}") for number in range(num_workers)]
        for number, worker in enumerate(self.workers):
            self.table.put(_record(worker, number, block_size), self.clock.at)
            self.table.connected(worker, Epoch(1))

    def report(self, worker: WorkerId, sequence: int) -> None:
        load = LoadReport(
            sequence=sequence,
            num_running=self.rng.randrange(32),
            context_tokens=self.rng.randrange(100_000),
            queued_prefill_tokens=self.rng.randrange(20_000),
            free_blocks=20_000,
            total_blocks=30_000,
            prefill_tokens_per_s=20_000.0,
            decode_step_s=0.02,
        )
        self.table.report(worker, load, self.clock.at)
        self.models.observe_load(worker, load)
        self.credit.reported(worker)


def _record(worker: WorkerId, number: int, block_size: int) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker,
        role=Role.PREFILL if number % 2 == 0 else Role.DECODE,
        epoch=Epoch(1),
        state=WorkerState.READY,
        layout_fingerprint="layout",
        weights_version="weights",
        block_size=block_size,
        max_model_len=200_000,
        kv_bytes_per_token=131_072,
        host=f"host{number // 8}",
        rack=f"rack{number // 64}",
        zone="zone",
        load=LoadReport(sequence=1, free_blocks=20_000, total_blocks=30_000),
    )


def _blocks(rng: random.Random, count: int) -> tuple[bytes, ...]:
    return tuple(rng.randbytes(16) for _ in range(count))


def shared_contexts(gateway: Deciding, num_blocks: int) -> Iterator[Prompt]:
    """Yield prompts that are one of 64 shared contexts and as much of their own; each worker holds four contexts."""
    shared = [_blocks(gateway.rng, num_blocks // 2) for _ in range(64)]
    for worker in gateway.workers:
        for _ in range(4):
            gateway.index.store(worker, gateway.rng.choice(shared))
    while True:
        hashes = gateway.rng.choice(shared) + _blocks(gateway.rng, num_blocks - num_blocks // 2)
        yield hashes, num_blocks * gateway.key.block_size


def time_decisions(gateway: Deciding, prompts: Iterable[Prompt], num_warm: int) -> dict[str, float]:
    """Decide on every prompt and return the figures of all but the first `num_warm`.

    Prompts come as fast as the prefill workers could compute them at 20,000 tokens per second.
    """
    sampling = SamplingParams(max_tokens=512)
    in_flight: deque[tuple[str, Decision]] = deque()
    num_workers = len(gateway.workers)
    reports_due, sequence = 0.0, 1
    timings: list[tuple[float, ...]] = []
    gc.collect()
    gc.freeze()
    for number, (own, num_tokens) in enumerate(prompts):
        request = GenerateRequest(RequestId(f"request-{number}"), (0,) * num_tokens, sampling)
        hashes = PromptHashes.known({gateway.key: own})
        gap_s = num_tokens / (num_workers / 2 * 20_000.0)
        gateway.clock.at += gap_s
        now = gateway.clock.at
        started = time.perf_counter()
        gateway.index.observe(own, now)
        observed = time.perf_counter()
        decision = gateway.placer.place(request, hashes, expected_output_tokens=256)
        placed = time.perf_counter()
        assert isinstance(decision, Decision), decision
        computing = decision.prefill or decision.decode
        assert computing is not None
        gateway.index.predict(computing, own, now, _PREDICTED_S)
        predicted = time.perf_counter()
        work_id = f"work-{number}"
        gateway.credit.place(work_id, decision, now, expected_output_tokens=256)
        ended = time.perf_counter()
        stamps = (started, observed, placed, predicted, ended)
        timings.append(tuple(stamps[at + 1] - stamps[at] for at in range(len(_STEPS))))

        in_flight.append((work_id, decision))
        if len(in_flight) > _IN_FLIGHT_PER_WORKER * num_workers:
            old_id, old = in_flight.popleft()
            for worker in (old.prefill, old.decode):
                if worker is not None:
                    gateway.credit.drop(worker, old_id)
        gateway.index.expire(now)
        reports_due += num_workers * gap_s
        while reports_due >= 1.0:
            reports_due -= 1.0
            sequence += 1
            gateway.report(gateway.rng.choice(gateway.workers), sequence)
    gc.unfreeze()
    kept = timings[num_warm:]
    wholes = sorted(sum(timing) for timing in kept)
    result = {"decisions/s": 1.0 / statistics.fmean(wholes), "p50 us": _at(wholes, 0.5), "p99 us": _at(wholes, 0.99)}
    for position, step in enumerate(_STEPS):
        result[f"{step} p50 us"] = _at(sorted(timing[position] for timing in kept), 0.5)
    return result


def _at(ordered: list[float], share: float) -> float:
    return 1e6 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[6_000, 30_000])
    parser.add_argument("--block-size", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--prompts", type=int, default=3_000, help="timed, after a tenth as many that are not")
    parser.add_argument("--cap-mib", type=int, default=256, help="of the prefix index")
    options = parser.parse_args()
    shown = Table()
    for num_workers in options.workers:
        for num_tokens in options.tokens:
            for block_size in options.block_size:
                gateway = Deciding(num_workers, block_size, options.cap_mib, random.Random(0))
                num_warm = options.prompts // 10
                prompts = islice(shared_contexts(gateway, num_tokens // block_size), options.prompts + num_warm)
                figures = time_decisions(gateway, prompts, num_warm)
                result = {"workers": num_workers, "tokens": num_tokens, "block_size": block_size, **figures}
                print(json.dumps({"benchmark": "router_decisions", **result}), flush=True)
                if not shown.columns:
                    for name in result:
                        shown.add_column(name, justify="right")
                shown.add_row(
                    *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in result.values())
                )
    _console.print(shown)


if __name__ == "__main__":
    main()
