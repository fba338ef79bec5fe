"""Log-probabilities of chosen tokens and of their most probable alternatives. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """Log-probabilities at one position, of the distribution before temperature and filters."""

    logprob: float
    top_logprobs: tuple[TokenLogprob, ...]


def token_details(logprobs: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenDetail]:
    """Return the details of each row; alternatives that cannot be chosen are left out.

    Args:
        logprobs: float32 [R, V].
        token_ids: chosen, of each row.
        counts: how many alternatives each row wants.
    """
    chosen = torch.tensor(token_ids, device=logprobs.device)
    own = logprobs.gather(1, chosen[:, None]).flatten().tolist()
    most = min(max(counts), logprobs.shape[1])
    if most == 0:
        return [TokenDetail(logprob, ()) for logprob in own]
    values, ids = largest(logprobs, most)
    possible = (values > -torch.inf).sum(dim=1).tolist()
    return [
        TokenDetail(logprob, tuple(map(TokenLogprob, row_ids[: min(count, most)], row_values[: min(count, most)])))
        for logprob, count, most, row_values, row_ids in zip(
            own, counts, possible, values.tolist(), ids.tolist(), strict=True
        )
    ]


def largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest values of each row, descending, equal ones by ascending id.

    Args:
        values: [R, V]; among values of minus infinity the order does not matter.
        count: at most V.
    Returns:
        values [R, count] and ids int64 [R, count].
    """
    look = min(count + 1, values.shape[1])  # one more shows whether the last place is tied
    top = torch.topk(values, look, dim=1)
    found, ids = top.values, top.indices
    is_tied = (found[:, 1:] == found[:, :-1]) & (found[:, 1:] > -torch.inf)
    for row in is_tied.any(dim=1).nonzero().flatten().tolist():
        # ascending ids; a stable sort keeps that order among equals
        at_least = ((values[row] >= found[row, count - 1]) & (values[row] > -torch.inf)).nonzero().flatten()
        order = torch.sort(values[row][at_least], descending=True, stable=True).indices[:count]
        ids[row, : len(order)] = at_least[order]
        found[row, : len(order)] = values[row][at_least[order]]
    return found[:, :count], ids[:, :count]
