"""What counts as well served, by the definitions of four papers, over one kind of outcome. Pure.

Everywhere a request that was refused, failed or never ended counts as a miss: an answer 429 is no way to meet a target.
The hand-off of the KV is the first gap after the first token; which definitions see it is said with each.

| definition | a request is good when | and goodput is |
|---|---|---|
| DistServe (OSDI'24) | TTFT and mean TPOT, the hand-off included | the highest rate per worker at which 90 % are |
| Mooncake (FAST'25) | TTFT, and the mean of the slowest 10 % of its gaps | good requests per second |
| P/D-Serve (2408.08147) | TTFT | end-to-end requests per second and worker, and the share with TTFT in target |
| JITServe (NSDI'26) | by its class: each token in time, or the whole answer | tokens (or requests) in time per second |
| Past-Future (ASPLOS'25) | TTFT, and its longest gap | good requests per second |"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.service_class import Slo
from simulator.outcomes import Outcome, Run

Gaps = Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds. `tbt_s`: of the slowest tenth of the gaps; `max_gap_s`: of the longest one."""

    ttft_s: float
    tpot_s: float
    tbt_s: float
    max_gap_s: float


# --- of one request ---------------------------------------------------------------------------------------------------


def meets_distserve(outcome: Outcome, targets: Targets) -> bool:
    """TTFT and mean gap, the hand-off included."""
    return _meets_ttft(outcome, targets.ttft_s) and outcome.tpot_s <= targets.tpot_s


def meets_mooncake(outcome: Outcome, targets: Targets) -> bool:
    """TTFT and the slowest tenth of the gaps."""
    return _meets_ttft(outcome, targets.ttft_s) and slowest_gaps_s(outcome.gaps) <= targets.tbt_s


def meets_pd_serve(outcome: Outcome, targets: Targets) -> bool:
    """TTFT, of a request that came to its end."""
    return _meets_ttft(outcome, targets.ttft_s)


def meets_past_future(outcome: Outcome, targets: Targets) -> bool:
    """TTFT and the longest gap."""
    longest_s = max((gap_s for gap_s, _ in outcome.gaps), default=0.0)
    return _meets_ttft(outcome, targets.ttft_s) and longest_s <= targets.max_gap_s


def tokens_in_time(outcome: Outcome, slo: Slo) -> int:
    """Return how many tokens of a request count by JITServe.

    With a deadline: all of them when the last one is in time, else none. Otherwise each token i that is there by
    ttft + i * tpot; with no target at all, all of them.
    """
    if not outcome.is_served or outcome.ttft_s is None or outcome.total_s is None:
        return 0
    if slo.deadline_s is not None:
        return outcome.num_tokens if outcome.total_s <= slo.deadline_s else 0
    if slo.ttft_s is None and slo.tpot_s is None:
        return outcome.num_tokens
    first_due_s = slo.ttft_s if slo.ttft_s is not None else outcome.ttft_s
    in_time = int(outcome.ttft_s <= first_due_s)
    now_s, index = outcome.ttft_s, 0
    for gap_s, count in outcome.gaps:
        in_time += _in_time(now_s, index, gap_s, count, first_due_s, slo.tpot_s)
        now_s += gap_s * count
        index += count
    return in_time


def is_in_time(outcome: Outcome, slo: Slo) -> bool:
    """Every token of the request counts by JITServe."""
    return outcome.is_served and tokens_in_time(outcome, slo) == outcome.num_tokens


def slowest_gaps_s(gaps: Gaps, share: float = 0.1) -> float:
    """Return the mean of the slowest `share` of the gaps, at least of one; 0 without gaps."""
    num_gaps = sum(count for _, count in gaps)
    if num_gaps == 0:
        return 0.0
    wanted = left = max(1, round(share * num_gaps))
    total_s = 0.0
    for gap_s, count in sorted(gaps, reverse=True):
        taken = min(count, left)
        total_s += taken * gap_s
        left -= taken
        if left == 0:
            break
    return total_s / wanted


def _meets_ttft(outcome: Outcome, ttft_s: float) -> bool:
    return outcome.is_served and outcome.ttft_s is not None and outcome.ttft_s <= ttft_s


def _in_time(now_s: float, index: int, gap_s: float, count: int, first_due_s: float, tpot_s: float | None) -> int:
    """Return how many of `count` tokens, `gap_s` apart from `now_s` on, are due no sooner than they come."""
    if tpot_s is None:
        return count  # only the first token had a due time
    return sum(now_s + k * gap_s <= first_due_s + (index + k) * tpot_s + 1e-12 for k in range(1, count + 1))


# --- of a run ---------------------------------------------------------------------------------------------------------


def attainment(run: Run, is_good: Callable[[Outcome], bool]) -> float:
    """Return the share of all requests that are good; 1 for no requests."""
    return sum(map(is_good, run.outcomes)) / len(run.outcomes) if run.outcomes else 1.0


def good_requests_per_s(run: Run, is_good: Callable[[Outcome], bool]) -> float:
    """Return good requests per second of the run."""
    return sum(map(is_good, run.outcomes)) / run.virtual_s


def tokens_in_time_per_s(run: Run) -> float:
    """JITServe's token goodput: every request by its own targets."""
    return sum(tokens_in_time(outcome, outcome.request.slo) for outcome in run.outcomes) / run.virtual_s


def served_per_s_and_worker(run: Run) -> float:
    """P/D-Serve's throughput: requests that came to their end, per second and worker."""
    return sum(outcome.is_served for outcome in run.outcomes) / run.virtual_s / run.num_workers


def mean_ttft_s(run: Run, *, miss_s: float) -> float:
    """Return the mean TTFT of all requests; a miss counts as `miss_s`, so that refusing is no way to be fast."""
    found = [outcome.ttft_s if outcome.is_served and outcome.ttft_s is not None else miss_s for outcome in run.outcomes]
    return sum(found) / len(found) if found else 0.0


def hit_ratio(run: Run) -> float:
    """Return which part of the served prompt tokens was found in a prefix cache."""
    served = [outcome for outcome in run.outcomes if outcome.is_served]
    prompt_tokens = sum(outcome.request.prompt_tokens for outcome in served)
    return sum(outcome.cached_tokens for outcome in served) / prompt_tokens if prompt_tokens else 0.0


def max_rate(attainment_at: Callable[[float], float], *, low: float, high: float, target: float = 0.9) -> float:
    """Return the highest rate that meets the target, by bisection within 2 % (DistServe's goodput, times the workers).

    Args:
        attainment_at: of a rate; falls with it, but for noise.
        low, high: rates between which to look; `low` is returned when even that misses.
    """
    if attainment_at(high) >= target:
        return high
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        if attainment_at(middle) >= target:
            low = middle
        else:
            high = middle
    return low
