"""Which candidates are worth a judge's time: constrained Bayesian optimisation over quality alone.

Ratio and codec time of every candidate are known; quality is what costs. For each floor in turn (all share what was
seen): the candidate of the best acquisition (gain in ratio over what is feasible at its speed, times the probability
of being feasible, plus a decaying bonus for the unknown) is judged on 8, then 32, then all prompts, as long as it may
still be feasible. What is dropped without asking:

- what is dominated: a feasible candidate has at least its ratio at no slower a codec;
- what is coarser in every knob, of one family, than a candidate whose estimate is below the floor (quality is
  monotone there, but for noise).

Stops when nothing is left, or when nothing promises a gain any more. A codec counts as slower only when it is clearly
slower (`SLOWER`): a front that consists of timing noise helps nobody. Pure but for `Observations`, through which the
judge is asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from profile_search.candidates import Candidate
from profile_search.cost import Cost
from profile_search.observations import Observations
from profile_search.scores import PromptScore, disagreement, quality_of
from profile_search.surrogate import features_of, guess

FLOORS = (0.99, 0.985, 0.98, 0.975, 0.97, 0.95)
FIRST_STEPS = (8, 32)  # of successive halving, in prompts; the last step is all of them
COLD_STARTS = 6
SLOWER = 1.7
_CLEARLY = 2.6  # standard errors below the floor
_PATIENCE = 4  # judged candidates in a row without a gain
_HOPELESS = 0.03  # expected gain in ratio, relative to the best, below which asking is not worth it


class Verdict(StrEnum):
    """About one candidate at one floor."""

    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Costed:
    """A lossy candidate with its cost; `codec_s` is of a typical frame, both directions."""

    candidate: Candidate
    cost: Cost
    codec_s: float

    def is_slower(self, other: "Costed") -> bool:
        """Tell whether it is clearly slower than `other`. Pure."""
        return self.codec_s > SLOWER * other.codec_s


def verdict(scores: Sequence[PromptScore], floor: float, num_prompts: int) -> Verdict:
    """Judge by the lower confidence bound once all prompts are in; before, only what is clearly below. Pure."""
    if not scores:
        return Verdict.OPEN
    if len(scores) >= num_prompts:
        return Verdict.FEASIBLE if quality_of(scores).agreement_low >= floor else Verdict.INFEASIBLE
    ratio, error = disagreement(scores, len(scores))
    return Verdict.INFEASIBLE if 1.0 - ratio + _CLEARLY * error < floor else Verdict.OPEN


def is_below(scores: Sequence[PromptScore], floor: float) -> bool:
    """Tell whether the estimate itself is below the floor, clearly while prompts are missing. Pure.

    Stricter than infeasible: the bound of the coarser neighbour may be the better one by the luck of the prompts.
    """
    if not scores:
        return False
    ratio, error = disagreement(scores, len(scores))
    margin = 0.0 if len(scores) > max(FIRST_STEPS) else _CLEARLY * error
    return 1.0 - ratio + margin < floor


def is_dominated(one: Costed, feasible: Sequence[Costed]) -> bool:
    """Tell whether a feasible candidate has at least the ratio at no slower a codec. Pure."""
    return any(other.cost.ratio >= one.cost.ratio and not other.is_slower(one) for other in feasible)


def is_coarser(one: Candidate, infeasible: Sequence[Candidate]) -> bool:
    """Tell whether `one` is at least as coarse in every knob as one of its family that is infeasible. Pure."""
    return any(
        other.traits == one.traits and all(a >= b for a, b in zip(one.coarseness, other.coarseness, strict=True))
        for other in infeasible
    )


def gain(one: Costed, feasible: Sequence[Costed]) -> float:
    """Return how much more ratio it has than anything feasible that is no slower; 1 is the ratio of none. Pure."""
    return one.cost.ratio - max((other.cost.ratio for other in feasible if not other.is_slower(one)), default=1.0)


def search(
    pool: Sequence[Costed],
    observations: Observations,
    floors: Sequence[float] = FLOORS,
    told: Callable[[float, int], None] = lambda floor, num_left: None,
) -> None:
    """Judge candidates until the front of every floor is known; what was found is in `observations`.

    Args:
        pool: lossy candidates.
        told: (floor, candidates that are left) after every judged candidate.
    """
    features = features_of([one.candidate for one in pool], [one.cost.ratio for one in pool])
    for floor in floors:
        _search_floor(pool, features, observations, floor, told)


def _search_floor(
    pool: Sequence[Costed],
    features: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    observations: Observations,
    floor: float,
    told: Callable[[float, int], None],
) -> None:
    num_prompts = observations.num_prompts
    idle = iteration = 0
    while True:
        verdicts = [verdict(observations.scores(one.candidate), floor, num_prompts) for one in pool]
        feasible = [one for one, is_ in zip(pool, verdicts, strict=True) if is_ is Verdict.FEASIBLE]
        infeasible = [one.candidate for one in pool if is_below(observations.scores(one.candidate), floor)]
        left = [
            at
            for at, one in enumerate(pool)
            if verdicts[at] is Verdict.OPEN
            and not is_dominated(one, feasible)
            and not is_coarser(one.candidate, infeasible)
        ]
        told(floor, len(left))
        if not left:
            return
        seen = [at for at, one in enumerate(pool) if observations.scores(one.candidate)]
        is_cold = len(seen) < COLD_STARTS
        if is_cold:
            chosen = _cold_start(pool, left, len(seen))
        else:
            guessed = guess(features, seen, [observations.scores(pool[at].candidate) for at in seen], num_prompts)
            gains = np.array([gain(pool[at], feasible) for at in left])
            expected = gains * guessed.feasible(floor)[left]
            best = max((one.cost.ratio for one in feasible), default=1.0)
            if idle >= _PATIENCE and expected.max() < _HOPELESS * best:
                return
            unknown = guessed.std[left] / max(float(guessed.std.max()), 1e-9)
            weight = max(0.02, 0.3 * 0.85**iteration)
            chosen = left[int(np.argmax(expected + weight * unknown * gains.mean()))]
        won = _halve(pool[chosen], observations, floor) is Verdict.FEASIBLE
        idle = 0 if won or is_cold else idle + 1
        iteration += 1


def _cold_start(pool: Sequence[Costed], left: Sequence[int], num_seen: int) -> int:
    """Return one of evenly spaced candidates over the ratio, aggressive first; the last is the mildest of all."""
    ordered = sorted(left, key=lambda at: -pool[at].cost.ratio)
    return ordered[num_seen * (len(ordered) - 1) // (COLD_STARTS - 1)]


def _halve(one: Costed, observations: Observations, floor: float) -> Verdict:
    """Judge on more and more prompts while it may be feasible."""
    num_prompts = observations.num_prompts
    for step in (*(step for step in FIRST_STEPS if step < num_prompts), num_prompts):
        found = verdict(observations.judged(one.candidate, step), floor, num_prompts)
        if found is not Verdict.OPEN:
            return found
    raise AssertionError("with all prompts judged the verdict is not open")
