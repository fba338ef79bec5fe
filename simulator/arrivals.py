"""When requests arrive: a recording replayed, or a process drawn. Pure but for the given generator.

Every function returns seconds from 0, in order. The traffic is open loop: nobody waits for an answer before the next
request comes."""

import itertools
import random
from collections.abc import Sequence


def spread_in_bins(stamps_s: Sequence[float], rng: random.Random, *, max_bin_s: float = 3.0) -> list[float]:
    """Draw every arrival anywhere between its stamp and the next different one.

    A recorder that rounds its stamps makes bursts which never were. `max_bin_s`: a pause longer than that is a pause.
    """
    distinct = sorted(set(stamps_s))
    width_s = {early: min(late - early, max_bin_s) for early, late in itertools.pairwise(distinct)}
    last_s = max_bin_s if len(distinct) > 1 else 0.0
    return sorted(stamp_s + rng.random() * width_s.get(stamp_s, last_s) for stamp_s in stamps_s)


def at_speed(arrivals_s: Sequence[float], speed: float) -> list[float]:
    """Return the same arrivals `speed` times as fast."""
    assert speed > 0
    return [arrival_s / speed for arrival_s in arrivals_s]


def poisson(rate_per_s: float, count: int, rng: random.Random) -> list[float]:
    """Return the first arrivals of a Poisson process."""
    return gamma(rate_per_s, 1.0, count, rng)


def gamma(rate_per_s: float, cv: float, count: int, rng: random.Random) -> list[float]:
    """Return arrivals whose gaps are Gamma distributed with this coefficient of variation: above 1 is bursty.

    Source: DistServe's simulator (OSDI'24), shape 1/cv^2, scale cv^2/rate.
    """
    assert rate_per_s > 0
    assert cv > 0
    arrivals_s, now_s = [], 0.0
    for _ in range(count):
        now_s += rng.gammavariate(1 / cv**2, cv**2 / rate_per_s)
        arrivals_s.append(now_s)
    return arrivals_s
