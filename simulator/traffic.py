"""Requests of a run made from a recording. Pure but for the given generator."""

import random
from collections.abc import Sequence

from core.service_class import NO_SLO, ServiceClass, Slo
from simulator.arrivals import at_speed, spread_in_bins
from simulator.outcomes import SimulatedRequest
from simulator.traces import Trace


def replay(
    trace: Trace, rng: random.Random, *, speed: float = 1.0, max_tokens: int = 2048, slo: Slo = NO_SLO
) -> list[SimulatedRequest]:
    """Replay a recording `speed` times as fast, arrivals spread inside the bins of its stamps."""
    arrivals_s = at_speed(spread_in_bins([request.stamp_s for request in trace.requests], rng), speed)
    return with_arrivals(trace, arrivals_s, max_tokens=max_tokens, slo=slo)


def with_arrivals(
    trace: Trace, arrivals_s: Sequence[float], *, max_tokens: int = 2048, slo: Slo = NO_SLO
) -> list[SimulatedRequest]:
    """Give the requests of a recording other arrivals, in order; the shorter of the two ends it."""
    start_s = arrivals_s[0] if arrivals_s else 0.0
    made = []
    for number, (request, arrival_s) in enumerate(zip(trace.requests, arrivals_s, strict=False)):
        full_blocks = request.prompt_tokens // trace.block_tokens
        made.append(
            SimulatedRequest(
                request_id=f"r{number}",
                arrival_s=arrival_s - start_s,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                hashes=tuple(block.to_bytes(16, "big") for block in request.blocks[:full_blocks]),
                max_tokens=max(max_tokens, request.output_tokens),
                slo=slo,
            )
        )
    return made


def in_classes(
    requests: Sequence[SimulatedRequest],
    shares: Sequence[tuple[ServiceClass, float, Slo]],
    rng: random.Random,
    *,
    tenants: Sequence[str] = ("",),
) -> list[SimulatedRequest]:
    """Draw a class by its share, and a tenant, for each request."""
    classes = [(service_class, slo) for service_class, _, slo in shares]
    weights = [share for _, share, _ in shares]
    made = []
    for request in requests:
        service_class, slo = rng.choices(classes, weights)[0]
        made.append(
            SimulatedRequest(
                request.request_id,
                request.arrival_s,
                request.prompt_tokens,
                request.output_tokens,
                request.hashes,
                request.max_tokens,
                tenant=rng.choice(tenants),
                service_class=service_class,
                slo=slo,
            )
        )
    return made
