"""Worlds for the replay of policies: made-up profiles of believable costs, bandwidths that drift, jobs that queue.

The codec costs are of the order of what `benchmarks.codec` measures on one core; the ratios are the ladder's. The
bandwidths span a factor of 50, from where the wire is everything to where the codecs are.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.kv_controller_replay import Job, Trace, Truth
from kv_transfer.choice import TransferTerms
from kv_transfer.codec import RAW
from kv_transfer.controller.arms import Arm
from kv_transfer.controller.policy import Pipeline

MB, GB = 1e6, 1e9
SLOWEST, FASTEST = 60 * MB, 3 * GB
FIXED_BANDWIDTHS = (60 * MB, 160 * MB, 425 * MB, 1.13 * GB, 3 * GB)
PIPELINE = Pipeline(frames_per_transfer=6, min_frame_bytes=256 * 1024, max_frame_bytes=16 << 20, codec_threads=2)

# name, ratio, encode and decode in raw bytes per second on one core, agreement at the lower bound
_LADDER = (
    ("lossless", 1.35, 0.45 * GB, 0.9 * GB, 1.0),
    ("int8", 1.9, 2.6 * GB, 3.0 * GB, 0.998),
    ("fp8", 1.97, 2.2 * GB, 2.6 * GB, 0.997),
    ("x3", 2.9, 1.6 * GB, 1.9 * GB, 0.995),
    ("x4", 3.8, 1.4 * GB, 1.7 * GB, 0.992),
    ("x5", 4.8, 1.2 * GB, 1.5 * GB, 0.988),
    ("x6", 5.7, 1.1 * GB, 1.4 * GB, 0.983),
    ("x7", 6.8, 0.75 * GB, 1.2 * GB, 0.979),
    ("x8", 8.1, 0.55 * GB, 1.0 * GB, 0.974),
    ("x9", 9.2, 0.40 * GB, 0.8 * GB, 0.968),
    ("x10", 10.4, 0.28 * GB, 0.6 * GB, 0.96),
)
FIXED_S = 0.0002
_FLOOR = 0.9  # of every request: below what any of them has


def ladder() -> tuple[Arm, ...]:
    """Return `none` and eleven profiles."""
    none = Arm("none", RAW, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, is_lossless=True, loss_rank=0)
    return (
        none,
        *(
            Arm(name, RAW, ratio, FIXED_S, 1 / encode, FIXED_S, 1 / decode, low, low == 1.0, rank)
            for rank, (name, ratio, encode, decode, low) in enumerate(_LADDER, 1)
        ),
    )


def jobs(rng: random.Random, *, num_jobs: int, per_s: float) -> list[Job]:
    """Return transfers of 1 to 64 MB (median 8) with Poisson arrivals; every third one begins during its prefill."""
    made, at_s = [], 0.0
    for _ in range(num_jobs):
        at_s += rng.expovariate(per_s)
        raw_bytes = int(min(64 * MB, max(1 * MB, rng.lognormvariate(math.log(8 * MB), 0.8))))
        compute_s = raw_bytes / (0.4 * GB) if rng.random() < 1 / 3 else 0.0
        terms = TransferTerms(quality_floor=_FLOOR, compute_s=compute_s)
        made.append(Job(at_s, raw_bytes, terms, rng.lognormvariate(0.0, 0.08), rng.lognormvariate(0.0, 0.08)))
    return made


def hurried(made: Sequence[Job], budget_s: float) -> list[Job]:
    """Return the same jobs under a budget."""
    return [replace(job, terms=replace(job.terms, budget_s=budget_s)) for job in made]


def truth(rng: random.Random, trace: Trace, arms: Sequence[Arm], *, spread: float) -> Truth:
    """Return a world whose codec times are off by a common and a private factor of about exp(spread)."""
    common = rng.lognormvariate(0.0, spread)
    factors = {arm.name: common * rng.lognormvariate(0.0, spread / 2) for arm in arms}
    ratios = {arm.name: rng.lognormvariate(0.0, 0.04) for arm in arms if arm.loss_rank}
    return Truth(trace, factors, ratios)


def fixed(bytes_per_s: float) -> Trace:
    return Trace((0.0,), (bytes_per_s,))


def steps(rng: random.Random, duration_s: float, dwell_s: float = 60.0) -> Trace:
    """Return jumps between the slowest, the fastest and the middle."""
    levels = (FASTEST, SLOWEST, FASTEST, math.sqrt(SLOWEST * FASTEST), SLOWEST, math.sqrt(SLOWEST * FASTEST))
    begin = rng.randrange(len(levels))
    starts = [idx * dwell_s for idx in range(max(1, math.ceil(duration_s / dwell_s)))]
    return Trace(starts, [levels[(begin + idx) % len(levels)] for idx in range(len(starts))])


def ramp(rng: random.Random, duration_s: float, period_s: float = 240.0) -> Trace:
    """Return a triangle on the logarithm, one piece per second."""
    phase = rng.random() * period_s
    starts = [float(idx) for idx in range(max(1, math.ceil(duration_s)))]
    span = math.log(FASTEST / SLOWEST)
    return Trace(
        starts, [SLOWEST * math.exp(span * abs(1 - 2 * ((at + phase) % period_s) / period_s)) for at in starts]
    )


def walk(rng: random.Random, duration_s: float, step: float = 0.12) -> Trace:
    """Return a random walk of the logarithm within the bounds, one piece per second."""
    low, high = math.log(SLOWEST), math.log(FASTEST)
    starts = [float(idx) for idx in range(max(1, math.ceil(duration_s)))]
    level, levels = rng.uniform(low, high), []
    for _ in starts:
        level += rng.gauss(0.0, step)
        level = 2 * low - level if level < low else 2 * high - level if level > high else level
        levels.append(math.exp(level))
    return Trace(starts, levels)
