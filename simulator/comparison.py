"""Arms against each other: the same traffic and seeds under several scenarios, as means with their intervals.

Runs are independent, so they go to several processes; the order of the results does not depend on that."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from simulator import goodput
from simulator.cluster import Scenario, simulate
from simulator.confidence import Estimate, estimate
from simulator.goodput import Targets
from simulator.outcomes import Run
from simulator.traffic import Workload

Values = Mapping[str, float]
Measure = Callable[[Run], Values]

MOONCAKE_TARGETS = Targets(ttft_s=30.0, tpot_s=0.1, tbt_s=0.1, max_gap_s=1.0)
"""Of long prompts: the TTFT threshold of Mooncake's evaluation."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to do it. `workload`: None: the comparison's own."""

    name: str
    scenario: Scenario
    workload: Workload | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one arm: values by name, one per seed."""

    arm: str
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]

    def estimate(self, name: str) -> Estimate:
        return estimate(self.values[name])

    def json_line(self, **labels: object) -> str:
        """Return the row as one line: labels, seeds, and for each value all seeds with mean and interval."""
        found = {}
        for name, values in self.values.items():
            mean = estimate(values)
            half = mean.half if len(values) > 1 else None
            found[name] = {"mean": mean.mean, "ci95": half, "by_seed": list(values)}
        return json.dumps({**labels, "arm": self.arm, "seeds": list(self.seeds), **found})


def serving_values(run: Run, targets: Targets = MOONCAKE_TARGETS) -> Values:
    """Return what is said of every run. Misses of any kind count as misses everywhere."""
    ttfts = sorted(outcome.ttft_s for outcome in run.outcomes if outcome.is_served and outcome.ttft_s is not None)
    num_requests = max(1, len(run.outcomes))
    tpots = [outcome.tpot_s for outcome in run.outcomes if outcome.is_served and outcome.num_tokens > 1]
    firsts = [outcome.gaps[0][0] for outcome in run.outcomes if outcome.gaps]
    return {
        "ttft_s": goodput.mean_ttft_s(run, miss_s=max(targets.ttft_s, ttfts[-1] if ttfts else 0.0)),
        "ttft_p50_s": _quantile(ttfts, 0.5),
        "ttft_p99_s": _quantile(ttfts, 0.99),
        "tpot_s": sum(tpots) / len(tpots) if tpots else 0.0,
        "second_gap_s": sum(firsts) / len(firsts) if firsts else 0.0,
        "missed": 1 - sum(outcome.is_served for outcome in run.outcomes) / num_requests,
        "hit_ratio": goodput.hit_ratio(run),
        "distserve": goodput.attainment(run, partial(goodput.meets_distserve, targets=targets)),
        "mooncake": goodput.attainment(run, partial(goodput.meets_mooncake, targets=targets)),
        "pd_serve": goodput.attainment(run, partial(goodput.meets_pd_serve, targets=targets)),
        "jitserve_tokens_per_s": goodput.tokens_in_time_per_s(run),
        "asked": run.num_orders / num_requests,
        "prefill_busy": _busy(run, "prefill"),
        "decode_busy": _busy(run, "decode"),
    }


def compare(
    arms: Sequence[Arm],
    workload: Workload,
    seeds: Sequence[int],
    *,
    measure: Measure = serving_values,
    pool: Executor | None = None,
) -> Iterator[Row]:
    """Run every arm under every seed; yield a row as soon as all seeds of an arm are there, in order.

    Args:
        pool: where to run (`processes`); None: here, one run after the other.
    """
    jobs = [(arm, arm.workload or workload, seed, measure) for arm in arms for seed in seeds]
    yield from _rows(map(_measure, jobs) if pool is None else pool.map(_measure, jobs), arms, seeds)


def processes(count: int) -> Executor:
    """Return a pool of fresh processes; the caller shuts it down."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def steady(run: Run) -> Run:
    """Leave out who came first and last: the caches fill, the queues drain."""
    last_s = max((outcome.request.arrival_s for outcome in run.outcomes), default=0.0)
    return run.between(0.1 * last_s, 0.95 * last_s)


def _measure(job: tuple[Arm, Workload, int, Measure]) -> Values:
    arm, workload, seed, measure = job
    return measure(steady(simulate(arm.scenario, workload.requests(seed), seed=seed)))


def _rows(found: Iterator[Values], arms: Sequence[Arm], seeds: Sequence[int]) -> Iterator[Row]:
    for arm in arms:
        by_seed = [next(found) for _ in seeds]
        names = by_seed[0] if by_seed else ()
        yield Row(arm.name, tuple(seeds), {name: tuple(values[name] for values in by_seed) for name in names})


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))] if ascending else 0.0


def _busy(run: Run, role: str) -> float:
    shares = [busy for worker, busy in run.busy_ratios.items() if worker.startswith(role)]
    return sum(shares) / len(shares) if shares else 0.0
