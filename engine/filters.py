"""Which tokens of a distribution may be sampled: top-k, then top-p over what is left, then min-p. Pure.

A row keeps its n most probable tokens, ties going to the lowest ids. To find n, only the values have to be in order,
and for nearly every row only the largest of them; the tokens are then found by comparing with the n-th value. So
nothing sorts a vocabulary with its ids, which would cost more than the rest of the sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.request import SamplingParams

_FIRST_LOOK = 128  # values; nearly every top-p set of a trained model is smaller


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that each of R rows may sample.

    Attributes:
        token_ids: int64 [R, C]; ascending, then padding.
        weights: float32 [R, C]; probability, or 0 in the padding; NaN in the first column of a row of NaN.
    """

    token_ids: torch.Tensor
    weights: torch.Tensor


def needs_filter(sampling: SamplingParams) -> bool:
    """Say whether any token is filtered out."""
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def filter_rows(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """Return the candidates of every row. Pure.

    Args:
        probabilities: float32 [R, V]; each row sums to 1, or is all NaN.
        params: of each row.
    """
    vocab_size = probabilities.shape[1]
    look = min(_FIRST_LOOK, vocab_size)
    descending = _largest_values(probabilities, look)
    kept, is_decided = kept_tokens(descending, params, vocab_size)
    border = descending[np.arange(len(params)), kept - 1]
    wide = (~is_decided).nonzero()[0].tolist()
    if wide:
        descending = _largest_values(probabilities[wide], vocab_size)
        kept[wide], _ = kept_tokens(descending, [params[row] for row in wide], vocab_size)
        border[wide] = descending[np.arange(len(wide)), kept[wide] - 1]
    rows, columns = _at_least(probabilities, border)
    found = np.bincount(rows, minlength=len(params))
    starts = np.cumsum(found) - found
    if (found > kept).any():  # the border cuts through a tie
        chosen = np.ones(len(rows), np.bool_)
        for row in (found > kept).nonzero()[0]:
            own = slice(starts[row], starts[row] + found[row])
            values = probabilities[row][torch.from_numpy(columns[own]).to(probabilities.device)].cpu().numpy()
            tied = (values == border[row]).nonzero()[0]
            chosen[starts[row] + tied[kept[row] - found[row] :]] = False
        rows, columns = rows[chosen], columns[chosen]
        starts = np.cumsum(kept) - kept
    width = np.maximum(kept, 1)  # a row of NaN keeps nothing; its first place shows that
    token_ids = np.zeros((len(params), int(width.max())), np.int64)
    token_ids[rows, np.arange(len(rows)) - starts[rows]] = columns
    is_padding = np.arange(token_ids.shape[1]) >= width[:, None]
    ids = torch.from_numpy(token_ids).to(probabilities.device)
    weights = probabilities.gather(1, ids).masked_fill_(torch.from_numpy(is_padding).to(ids.device), 0.0)
    return Candidates(ids, weights)


def kept_tokens(
    descending: NDArray[np.float32], params: Sequence[SamplingParams], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return how many of its most probable tokens each row keeps, and whether C values were enough to tell. Pure.

    Args:
        descending: [R, C]; the C largest probabilities.
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
    possible = (descending > 0.0).sum(axis=1)  # the rest of a row that ends in zeros cannot be sampled anyway
    possible = np.where(possible < seen, possible, vocab_size)
    kept = np.minimum(np.minimum(limit, possible), np.minimum(reached, probable))
    total_unknown = (top_p < 1.0) & (limit < vocab_size) & (limit > seen) & (possible == vocab_size)
    is_decided = (kept <= seen) & ~total_unknown | (seen == vocab_size)
    return np.minimum(kept, seen), is_decided


def _largest_values(matrix: torch.Tensor, count: int) -> NDArray[np.float32]:
    """Return the `count` largest values of each row, descending, on the host."""
    if matrix.device.type == "cpu":  # numpy sorts floats many times faster than torch does
        values: NDArray[np.float32] = matrix.numpy()
        if count < values.shape[1]:
            values = np.partition(values, values.shape[1] - count, axis=1)[:, -count:]
        return np.sort(values, axis=1)[:, ::-1]
    return torch.topk(matrix, count, dim=1).values.cpu().numpy()


def _at_least(matrix: torch.Tensor, border: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row and column of every value that is at least its row's border, in order, on the host."""
    if matrix.device.type == "cpu":
        rows, columns = np.nonzero(matrix.numpy() >= border[:, None])
        return rows, columns
    found = (matrix >= torch.from_numpy(border.copy()).to(matrix.device)[:, None]).nonzero().cpu().numpy()
    return found[:, 0], found[:, 1]
