"""The choice among candidates whose terms are known: budget, hysteresis, margin of quality, trial. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kv_transfer.controller.arms import Arm
from kv_transfer.controller.config import ControllerConfig
from kv_transfer.controller.decisions import Candidate, DecisionReason
from kv_transfer.controller.model import MIN_EXPOSED_S


class Entry(NamedTuple):
    """One candidate in the choice.

    Attributes:
        score_s: predicted time and the price of crowding; what is minimised.
        sampled_s: the same with the time drawn from its distribution; equal when nothing may be tried.
    """

    arm: Arm
    candidate: Candidate
    score_s: float
    sampled_s: float


@dataclass(frozen=True, slots=True)
class Incumbent:
    """What was chosen last in this context.

    Attributes:
        debt: sum of the parts of the exposed time that keeping it has cost; what bounds the price of hysteresis.
    """

    profile: str
    debt: float = 0.0


@dataclass(frozen=True, slots=True)
class Chosen:
    entry: Entry
    reason: DecisionReason
    meets_budget: bool
    incumbent: Incumbent


def choose(
    entries: Sequence[Entry],
    incumbent: Incumbent | None,
    budget_s: float | None,
    compute_s: float,
    config: ControllerConfig,
    *,
    is_prior: bool = False,
) -> Chosen:
    """Return the entry to take. Pure.

    Those that are expected to meet the budget are preferred; if there are none, the fastest is taken. Of the rest, the
    lowest score wins, but for three reasons: one that loses little is less lossy; the incumbent loses little of the
    exposed time, has not lost it often, and is not the lossier one; a draw from the distributions says that another may
    be faster.

    Args:
        is_prior: the goodput is a guess: the lowest score wins.
    """
    if budget_s is not None:
        meeting = [entry for entry in entries if _exposed(entry, compute_s) <= budget_s]
        if not meeting:
            fastest = min(entries, key=lambda entry: entry.candidate.predicted_s)
            return Chosen(fastest, DecisionReason.BUDGET_MISSED, False, Incumbent(fastest.arm.name))
        entries = meeting
    best = min(entries, key=lambda entry: entry.score_s)
    if len(entries) == 1:
        return Chosen(best, DecisionReason.ONLY_ALLOWED, True, Incumbent(best.arm.name))
    if is_prior:  # margins of a guess are no margins
        return Chosen(best, DecisionReason.UNMEASURED_LINK, True, Incumbent(best.arm.name))
    preferred, reason = _least_lossy(entries, best, config)
    kept = _kept(entries, incumbent, best, compute_s, config)
    if kept is not None and kept.entry.arm.loss_rank > preferred.arm.loss_rank:
        kept = None  # nothing speaks for more loss than the preferred one's
    if kept is not None and kept.entry.arm is not preferred.arm:
        preferred, reason, held = kept.entry, DecisionReason.KEPT, kept.incumbent
    else:
        held = Incumbent(preferred.arm.name)
    tried = min(entries, key=lambda entry: entry.sampled_s)
    if tried is not preferred and tried.sampled_s < preferred.sampled_s * (1.0 - config.hysteresis_ratio):
        return Chosen(tried, DecisionReason.TRIED, True, held)
    return Chosen(preferred, reason, True, held)


def _exposed(entry: Entry, compute_s: float) -> float:
    return entry.candidate.predicted_s - compute_s


def _least_lossy(entries: Sequence[Entry], best: Entry, config: ControllerConfig) -> tuple[Entry, DecisionReason]:
    near_s = best.score_s * (1.0 + config.quality_margin_ratio)
    hidden_s = best.score_s * (1.0 + config.hysteresis_ratio)
    least, reason = best, DecisionReason.FASTEST
    for entry in entries:
        if entry.arm.loss_rank >= least.arm.loss_rank:
            continue
        if entry.candidate.is_hidden and entry.score_s <= hidden_s:
            least, reason = entry, DecisionReason.HIDDEN
        elif entry.score_s <= near_s:
            least, reason = entry, DecisionReason.LESS_LOSSY
    return least, reason


@dataclass(frozen=True, slots=True)
class _Kept:
    entry: Entry
    incumbent: Incumbent


def _kept(
    entries: Sequence[Entry], incumbent: Incumbent | None, best: Entry, compute_s: float, config: ControllerConfig
) -> _Kept | None:
    if incumbent is None:
        return None
    for entry in entries:
        if entry.arm.name == incumbent.profile:
            lost = (entry.score_s - best.score_s) / max(best.score_s - compute_s, MIN_EXPOSED_S)
            debt = incumbent.debt + lost
            return _Kept(entry, Incumbent(incumbent.profile, debt)) if debt <= config.hysteresis_ratio else None
    return None
