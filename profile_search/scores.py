"""What was seen on each prompt, and what follows for all prompts: agreement and divergence with their bounds.

Pure. Both are ratios of sums over prompts (positions differ in number), so the bootstrap resamples prompts: positions
of one prompt are not independent. A lower bound is never better than a Wilson interval over all positions allows:
64 prompts without a difference do not prove that there never is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_transfer.profile import Quality

CONFIDENCE = 0.95
_Z = 1.96
_RESAMPLES = 2000
_SEED = 20240607


@dataclass(frozen=True, slots=True)
class PromptScore:
    """One prompt under one pipeline.

    Attributes:
        num_agreed: positions whose most likely token is the reference's.
        kl_sum: nats, over the positions.
        raw_bytes, wire_bytes: of the prompt's KV; the wire's with everything that is sent for it.
    """

    num_positions: int
    num_agreed: int
    kl_sum: float
    raw_bytes: int
    wire_bytes: int


def score_prompt(reference: Tensor, injected: Tensor, raw_bytes: int, wire_bytes: int) -> PromptScore:
    """Compare float32 logits [positions, V]. Pure."""
    wanted, got = torch.log_softmax(reference, dim=-1), torch.log_softmax(injected, dim=-1)
    agreed = int((reference.argmax(dim=-1) == injected.argmax(dim=-1)).sum())
    kl = float((wanted.exp() * (wanted - got)).sum().clamp_min(0.0))
    return PromptScore(len(reference), agreed, kl, raw_bytes, wire_bytes)


def quality_of(scores: Sequence[PromptScore]) -> Quality:
    """Return the estimate over all prompts, with bounds; the seed is fixed, so equal scores give equal bounds. Pure."""
    table = np.array([(score.num_agreed, score.kl_sum, score.num_positions) for score in scores], dtype=np.float64)
    drawn = np.random.default_rng(_SEED).integers(0, len(table), (_RESAMPLES, len(table)))
    sums = table[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    agreement_low, agreement_high = np.quantile(sums[:, 0] / sums[:, 2], [tail, 1 - tail])
    kl_low, kl_high = np.quantile(sums[:, 1] / sums[:, 2], [tail, 1 - tail])
    agreed, kl, positions = table.sum(axis=0)
    wilson_low, wilson_high = wilson(agreed, positions)
    return Quality(
        agreement=agreed / positions,
        agreement_low=min(float(agreement_low), wilson_low),
        agreement_high=max(float(agreement_high), wilson_high),
        kl=kl / positions,
        kl_low=float(kl_low),
        kl_high=float(kl_high),
        num_prompts=len(table),
        num_positions=int(positions),
        confidence=CONFIDENCE,
    )


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """Return the bounds of a proportion (Wilson 1927). Pure."""
    ratio, square = successes / trials, _Z * _Z / trials
    middle = (ratio + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(ratio * (1 - ratio) / trials + square / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio_of(scores: Sequence[PromptScore]) -> float:
    """Return raw over wire bytes of all prompts together. Pure."""
    return sum(score.raw_bytes for score in scores) / sum(score.wire_bytes for score in scores)


def disagreement(scores: Sequence[PromptScore], num_prompts: int) -> tuple[float, float]:
    """Return the part of positions that differ and its standard error, as it would be with `num_prompts`. Pure.

    The variance of a ratio estimator, and never less than that of one more differing position.
    """
    differing = np.array([score.num_positions - score.num_agreed for score in scores], dtype=np.float64)
    positions = np.array([score.num_positions for score in scores], dtype=np.float64)
    ratio = differing.sum() / positions.sum()
    spread = float(np.sum((differing - ratio * positions) ** 2)) / max(1, len(scores) - 1) / positions.mean() ** 2
    least = (1.0 / positions.sum()) ** 2 * len(scores)
    return float(ratio), math.sqrt(max(spread, least) / num_prompts)
