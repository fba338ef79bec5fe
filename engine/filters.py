"""Which tokens of a distribution may be sampled: top-k, then top-p over what is left, then min-p. Pure.

Works on the most probable tokens in order and looks further down only for the rows that need it, because sorting a
whole vocabulary costs more than the rest of the sampler. Ties go to the lowest token id, so that "the k most probable"
means exactly k whatever order the hardware sorts in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.request import SamplingParams

_FIRST_LOOK = 64  # candidates; nearly every top-p set of a trained model is smaller
_SECOND_LOOK = 1024


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that some rows may sample, most probable first.

    Attributes:
        rows: which rows of the distribution these are.
        token_ids: int64 [R, C].
        weights: float32 [R, C]; probability, or 0 where the row keeps fewer than C tokens.
    """

    rows: list[int]
    token_ids: torch.Tensor
    weights: torch.Tensor


def needs_filter(sampling: SamplingParams) -> bool:
    """Say whether any token is filtered out."""
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def largest(values: torch.Tensor, count: int, dead: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest values of each row in descending order, equal ones by ascending id. Pure.

    Args:
        values: [R, V].
        count: at most V.
        dead: the smallest value there is; the order among tokens that have it does not matter.
    Returns:
        values [R, count] and ids int64 [R, count].
    """
    look = min(count + 1, values.shape[1])  # one more shows whether the border cuts through a tie
    top = torch.topk(values, look, dim=1)
    found, ids = top.values, top.indices
    tied = ((found[:, 1:] == found[:, :-1]) & (found[:, 1:] > dead)).any(dim=1)
    for row in tied.nonzero().flatten().tolist():
        border = found[row, count - 1]
        is_candidate = values[row] >= border if border > dead else values[row] > dead
        at_least = is_candidate.nonzero().flatten()  # ascending ids; a stable sort keeps that order among equals
        order = torch.sort(values[row][at_least], descending=True, stable=True).indices[:count]
        ids[row, : len(order)] = at_least[order]
        found[row, : len(order)] = values[row][ids[row, : len(order)]]
    return found[:, :count], ids[:, :count]


def filter_rows(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> list[Candidates]:
    """Return, in at most three groups, the candidates of every row. Pure.

    Args:
        probabilities: float32 [R, V]; each row sums to 1.
        params: of each row.
    """
    vocab_size = probabilities.shape[1]
    groups = []
    rows = list(range(len(params)))
    for look in sorted({min(look, vocab_size) for look in (_FIRST_LOOK, _SECOND_LOOK, vocab_size)}):
        found, ids = largest(probabilities if len(rows) == len(params) else probabilities[rows], look, dead=0.0)
        kept, is_decided = kept_tokens(found.cpu().numpy(), [params[row] for row in rows], vocab_size)
        done = is_decided.nonzero()[0].tolist()
        if done:
            counts = torch.from_numpy(kept[done]).to(found.device)
            width = int(counts.max())
            weights = found[done, :width]
            weights[torch.arange(width, device=found.device) >= counts[:, None]] = 0.0
            groups.append(Candidates([rows[at] for at in done], ids[done, :width], weights))
        rows = [row for row, decided in zip(rows, is_decided, strict=True) if not decided]
        if not rows:
            break
    assert not rows, "a look at the whole vocabulary decides every row"
    return groups


def kept_tokens(
    descending: NDArray[np.float32], params: Sequence[SamplingParams], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return how many of its most probable tokens each row keeps, and whether C tokens were enough to tell. Pure.

    Args:
        descending: [R, C]; the C most probable tokens' probabilities.
    """
    seen = descending.shape[1]
    top_p = np.array([row.top_p for row in params])
    min_p = np.array([row.min_p for row in params])
    limit = np.array([min(row.top_k or vocab_size, vocab_size) for row in params])
    mass = np.cumsum(descending, axis=1, dtype=np.float64)
    # top-p is a share of what top-k left; of the whole, which is 1, where top-k is off
    total = np.where(limit < vocab_size, mass[np.arange(len(params)), np.minimum(limit, seen) - 1], 1.0)
    reached = (mass < (top_p * total)[:, None]).sum(axis=1) + 1  # the token that reaches the share is kept too
    reached = np.where(top_p < 1.0, reached, vocab_size)
    probable = (descending >= min_p[:, None] * descending[:, :1]).sum(axis=1)
    probable = np.where((min_p > 0.0) & (probable < seen), probable, vocab_size)
    kept = np.minimum(np.minimum(limit, reached), probable)
    total_unknown = (top_p < 1.0) & (limit < vocab_size) & (limit > seen)
    is_decided = (kept <= seen) & ~total_unknown | (seen == vocab_size)
    return np.minimum(kept, seen), is_decided
