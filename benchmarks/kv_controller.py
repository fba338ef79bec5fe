"""What the controller costs and what it gains: decision time, and regret in a replayed world; a JSON line per result.

- `decision`: wall and CPU time of one decision (and of one lesson) with 12 profiles and 64 links, after a warm-up.
- `replay`: exposed hand-off time (prefill end to acknowledged) of the controller, of every static profile, and of the
  oracle in hindsight, on traces of bandwidth: jumps, ramps and random walks over a factor of 50, and five fixed ones.
  The true codec times differ from the profiles' by random factors, times are noisy, transfers queue. Means over seeds
  with 95 % intervals. `best_static` is the one profile that is the best over all seeds of a trace, and
  `best_static_of_each` is chosen anew, in hindsight, for each seed.

Everything is seeded; the decision times apart, two runs print the same.
Run ``python -m benchmarks.kv_controller --help``.
"""

import argparse
import gc
import itertools
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks import kv_controller_worlds as worlds
from benchmarks.kv_controller_replay import Job, Trace, replay, replay_oracle
from core.ids import RequestId, TransferId, WorkerId
from kv_transfer.choice import LinkView, TransferObservation, TransferQuestion, TransferTerms
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.controller import ControllerPolicy
from kv_transfer.controller.static_policy import StaticPolicy

TRACES: dict[str, Callable[[random.Random, float], Trace]] = {
    "steps": worlds.steps,
    "ramp": worlds.ramp,
    "walk": worlds.walk,
}
ALTRUISMS = (0.0, 0.5)
NUM_LINKS = 64


@dataclass(frozen=True, slots=True)
class World:
    """One cell of the replay."""

    name: str
    seed: int
    num_jobs: int
    per_s: float
    spread: float


@dataclass(frozen=True, slots=True)
class Means:
    """Mean exposed seconds in one world."""

    controller_s: float
    oracle_s: float
    statics_s: dict[str, float]


def measure(world: World) -> Means:
    """Replay one world under all policies."""
    rng = random.Random(f"{world.name} {world.seed}")
    arms = worlds.ladder()
    jobs = worlds.jobs(rng, num_jobs=world.num_jobs, per_s=world.per_s)
    duration_s = jobs[-1].at_s + 60.0
    trace = TRACES[world.name](rng, duration_s) if world.name in TRACES else worlds.fixed(float(world.name))
    truth = worlds.truth(rng, trace, arms, spread=world.spread)
    config, pipeline = ControllerConfig(), worlds.PIPELINE
    controller = ControllerPolicy(arms, config, pipeline, random.Random(world.seed))
    statics = {
        arm.name: _exposed_s(replay(StaticPolicy(arms, arm.name, config, pipeline), jobs, truth, pipeline), jobs)
        for arm in arms
    }
    oracles = [
        _exposed_s(replay_oracle(arms, jobs, truth, pipeline, altruism=altruism), jobs) for altruism in ALTRUISMS
    ]
    return Means(_exposed_s(replay(controller, jobs, truth, pipeline), jobs), min(oracles), statics)


def _exposed_s(times: Sequence[float], jobs: Sequence[Job]) -> float:
    return statistics.fmean(total_s - job.terms.compute_s for total_s, job in zip(times, jobs, strict=True))


def summary(name: str, means: Sequence[Means], per_s: float, spread: float) -> dict[str, object]:
    """Return what is told of one trace."""
    totals = {arm: sum(each.statics_s[arm] for each in means) for arm in means[0].statics_s}
    best = min(totals, key=lambda arm: totals[arm])
    return {
        "benchmark": "kv_controller.replay",
        "trace": name,
        "seeds": len(means),
        "requests_per_s": per_s,
        "codec_spread": spread,
        "controller_ms": _interval([each.controller_s * 1e3 for each in means]),
        "oracle_ms": _interval([each.oracle_s * 1e3 for each in means]),
        "regret": _interval([each.controller_s / each.oracle_s - 1.0 for each in means], digits=4),
        "regret_pooled": round(
            sum(each.controller_s for each in means) / sum(each.oracle_s for each in means) - 1.0, 4
        ),
        "best_static": best,
        "gain_over_best_static": _interval([each.statics_s[best] / each.controller_s for each in means]),
        "gain_over_best_static_of_each": _interval(
            [min(each.statics_s.values()) / each.controller_s for each in means]
        ),
        "oracle_over_best_static_of_each": _interval([min(each.statics_s.values()) / each.oracle_s for each in means]),
        "gain_over_none": _interval([each.statics_s["none"] / each.controller_s for each in means]),
        "gain_over_static": {
            arm: round(total_s / sum(each.controller_s for each in means), 3) for arm, total_s in totals.items()
        },
    }


def _interval(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return mean and 95 % interval over seeds (normal; the seeds are independent)."""
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(mean, digits), "low": round(mean - half, digits), "high": round(mean + half, digits)}


def decision_times(num_decisions: int) -> dict[str, object]:
    """Time decisions of a policy that has learned something, as a worker asks them."""
    arms = worlds.ladder()
    rng = random.Random(7)
    policy = ControllerPolicy(arms, ControllerConfig(), worlds.PIPELINE, random.Random(1))
    questions = [_question(rng, idx) for idx in range(num_decisions + 2000)]
    wall: list[float] = []
    cpu: list[float] = []
    lessons: list[float] = []
    gc.collect()
    for idx, question in enumerate(questions):
        now = idx * 0.02
        begun, begun_cpu = time.perf_counter(), time.thread_time()
        decision = policy.decide(question, now)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.thread_time() - begun_cpu)
        chosen = decision.chosen
        observed_s = chosen.predicted_s * rng.lognormvariate(0.05, 0.1)
        payload_bytes = max(1, int(question.raw_bytes / policy.arms[chosen.profile].ratio))
        observation = TransferObservation(
            question.transfer_id, observed_s, observed_s, question.raw_bytes, payload_bytes
        )
        begun = time.perf_counter()
        policy.learn(decision, observation, now)
        lessons.append(time.perf_counter() - begun)
    return {
        "benchmark": "kv_controller.decision",
        "profiles": len(arms),
        "links": NUM_LINKS,
        "decisions": num_decisions,
        "wall_us": _percentiles(wall[2000:]),
        "cpu_us": _percentiles(cpu[2000:]),
        "lesson_wall_us": _percentiles(lessons[2000:]),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


def _question(rng: random.Random, idx: int) -> TransferQuestion:
    budget_s = 0.1 if rng.random() < 0.2 else None
    terms = TransferTerms(rng.choice((0.9, 0.9, 0.97, 0.99, 1.0)), budget_s, "tenant", rng.choice((0.0, 0.0, 0.05)))
    link = LinkView("tcp", rng.lognormvariate(math.log(4e8), 1.0), 0.0005, rng.choice((0, 0, 1_000_000)))
    raw_bytes = int(min(64e6, max(1e6, rng.lognormvariate(math.log(8e6), 0.8))))
    peer = WorkerId(f"decode-{rng.randrange(NUM_LINKS)}")
    return TransferQuestion(TransferId(str(idx)), RequestId(str(idx)), peer, raw_bytes, raw_bytes // 1000, terms, link)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ranked = sorted(seconds)
    return {
        name: round(ranked[min(len(ranked) - 1, int(len(ranked) * part))] * 1e6, 1)
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("decision", "replay"), help="one of the two")
    parser.add_argument("--seeds", type=int, default=8, help="worlds per trace (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1500, help="transfers per world (default: %(default)s)")
    parser.add_argument("--per-s", type=float, default=4.0, help="requests per second (default: %(default)s)")
    parser.add_argument(
        "--spread", type=float, default=0.4, help="log deviation of the true codec times (default: %(default)s)"
    )
    parser.add_argument("--decisions", type=int, default=20_000, help="decisions timed (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    given = parser.parse_args()
    if given.only != "replay":
        print(json.dumps(decision_times(given.decisions)), flush=True)
    if given.only == "decision":
        return
    names = [*TRACES, *(str(bandwidth) for bandwidth in worlds.FIXED_BANDWIDTHS)]
    cells = [World(name, seed, given.jobs, given.per_s, given.spread) for name in names for seed in range(given.seeds)]
    with ProcessPoolExecutor(given.processes) as pool:
        measured = pool.map(measure, cells)  # in order, as they are done
        for name in names:
            means = list(itertools.islice(measured, given.seeds))
            print(json.dumps(summary(name, means, given.per_s, given.spread)), flush=True)


if __name__ == "__main__":
    main()
