"""The traffic of a run: requests of a recording, with arrivals replayed or drawn, in classes. Drawn from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import xxhash

from core.service_class import NO_SLO, ServiceClass, Slo
from simulator.arrivals import at_speed, gamma, spread_in_bins
from simulator.outcomes import SimulatedRequest
from simulator.traces import Trace, read_trace


@dataclass(frozen=True, slots=True)
class ClassShare:
    """A part of the traffic."""

    service_class: ServiceClass
    share: float
    slo: Slo = NO_SLO


@dataclass(frozen=True, slots=True)
class Workload:
    """What to make of a recording.

    Attributes:
        speed: the recording is replayed so many times as fast, arrivals spread inside the bins of its stamps.
        rate_per_s: instead of a replay, arrivals are drawn at this rate, with coefficient of variation `cv`.
        max_tokens: that clients allow; a recorded output that is longer raises it.
        classes: drawn by share for each request; nothing but the default class when empty.
        tenants: drawn evenly.
    """

    trace_path: Path
    max_requests: int | None = None
    speed: float = 1.0
    rate_per_s: float | None = None
    cv: float = 1.0
    max_tokens: int = 2048
    classes: tuple[ClassShare, ...] = ()
    tenants: tuple[str, ...] = ("",)

    def requests(self, seed: int) -> list[SimulatedRequest]:
        """Make the requests of one run.

        Raises:
            ConfigError: the recording cannot be read.
        """
        rng = random.Random(f"traffic {seed}")
        trace = _trace(self.trace_path, self.max_requests)
        if self.rate_per_s is None:
            arrivals_s = at_speed(spread_in_bins([one.stamp_s for one in trace.requests], rng), self.speed)
        else:
            arrivals_s = gamma(self.rate_per_s, self.cv, len(trace.requests), rng)
        made = with_arrivals(trace, arrivals_s, max_tokens=self.max_tokens)
        return in_classes(made, self.classes, self.tenants, rng) if self.classes else made

    @property
    def block_tokens(self) -> int:
        return _trace(self.trace_path, self.max_requests).block_tokens


@lru_cache(maxsize=4)
def _trace(path: Path, max_requests: int | None) -> Trace:
    return read_trace(path, max_requests=max_requests)


def with_arrivals(trace: Trace, arrivals_s: Sequence[float], *, max_tokens: int = 2048) -> list[SimulatedRequest]:
    """Give the requests of a recording these arrivals, in order; the first one is second 0. Pure."""
    made = []
    for number, (request, arrival_s) in enumerate(zip(trace.requests, arrivals_s, strict=True)):
        full_blocks = request.prompt_tokens // trace.block_tokens
        made.append(
            SimulatedRequest(
                request_id=f"r{number}",
                arrival_s=arrival_s - arrivals_s[0],
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                hashes=tuple(map(block_hash, request.blocks[:full_blocks])),
                max_tokens=max(max_tokens, request.output_tokens),
            )
        )
    return made


def block_hash(block: int) -> bytes:
    """Return the hash that stands for a block of a recording: spread evenly, as real ones are."""
    return xxhash.xxh3_128_digest(block.to_bytes(8, "big"))


def in_classes(
    requests: Sequence[SimulatedRequest], classes: Sequence[ClassShare], tenants: Sequence[str], rng: random.Random
) -> list[SimulatedRequest]:
    """Draw a class by its share, and a tenant, for each request. Pure but for the draws."""
    weights = [one.share for one in classes]
    made = []
    for request in requests:
        drawn = rng.choices(classes, weights)[0]
        tenant = rng.choice(tenants)
        made.append(replace(request, tenant=tenant, service_class=drawn.service_class, slo=drawn.slo))
    return made
