"""The Pareto front over (ratio, quality, codec time), and how much of it a search found. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from profile_search.search import Costed


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate with its quality on all prompts: mean agreement and its bounds."""

    one: Costed
    agreement: float
    agreement_low: float
    agreement_high: float


def pareto(judged: Sequence[Judged]) -> list[Judged]:
    """Return those that no other beats in one respect without losing in another, by ratio."""

    def beats(a: Judged, b: Judged) -> bool:
        ratios, lows = (a.one.cost.ratio, b.one.cost.ratio), (a.agreement_low, b.agreement_low)
        if a.one.is_slower(b.one) or ratios[0] < ratios[1] or lows[0] < lows[1]:
            return False
        return ratios[0] > ratios[1] or lows[0] > lows[1] or b.one.is_slower(a.one)

    front = [b for b in judged if not any(beats(a, b) for a in judged)]
    return sorted(front, key=lambda item: item.one.cost.ratio)


def best_at(judged: Sequence[Judged], floor: float) -> Judged | None:
    """Return the highest ratio whose lower bound reaches `floor`."""
    return max(
        (item for item in judged if item.agreement_low >= floor), key=lambda item: item.one.cost.ratio, default=None
    )


@dataclass(frozen=True, slots=True)
class FloorComparison:
    """The best of a search against the best of all, at one floor.

    Attributes:
        is_same: equal ratio within 3 % (a search looks for no smaller gain), or the difference is a candidate whose
            interval holds the floor: one that another draw of prompts might as well have refused.
    """

    floor: float
    found_ratio: float
    exhaustive_ratio: float
    is_same: bool


def compare(found: Sequence[Judged], everything: Sequence[Judged], floors: Sequence[float]) -> list[FloorComparison]:
    """Compare floor by floor."""
    rows = []
    for floor in floors:
        ours, theirs = best_at(found, floor), best_at(everything, floor)
        our_ratio, their_ratio = (item.one.cost.ratio if item else 1.0 for item in (ours, theirs))
        is_close = our_ratio >= 0.97 * their_ratio
        is_doubtful = theirs is not None and theirs.agreement_low - floor < 0.25 * (
            theirs.agreement - theirs.agreement_low
        )
        rows.append(FloorComparison(floor, our_ratio, their_ratio, is_close or is_doubtful))
    return rows
