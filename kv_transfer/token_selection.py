"""Which tokens of a prompt are handed over when not all are: heavy hitters, the first ones, and the most recent ones.

An opt-in, lossy stage of a profile. The sender scores the prompt when it is computed (the engine's affair), keeps what
is chosen here, and sends it as if it were the whole: the tokens move together, so that frames, coverage and blocks know
of no gaps. Their keys keep the rotation of the positions that they had.

Source: H2O (Zhang et al. 2023) for heavy hitters beside a recent window; StreamingLLM (Xiao et al. 2023) for sinks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSelection:
    """How many tokens are kept, and which whatever their score.

    Attributes:
        keep_ratio: part of the tokens to send that is kept, in (0, 1); rounded up.
        sink_tokens, recent_tokens: first and last tokens of the prompt, always kept, within the budget.
    """

    keep_ratio: float
    sink_tokens: int = 4
    recent_tokens: int = 32

    def num_kept(self, num_tokens: int) -> int:
        """Return the budget for `num_tokens` to send: at least the recent window, if there are so many. Pure."""
        return min(num_tokens, max(math.ceil(num_tokens * self.keep_ratio), self.recent_tokens, 1))

    def select(self, scores: Tensor, held_tokens: int) -> Tensor:
        """Choose what to send past the prefix that the receiver holds. Pure.

        Args:
            scores: float [T], one per prompt token; the larger the more it matters.
            held_tokens: leading tokens that the receiver has, all of them; fewer than T.
        Returns:
            int64 [kept], positions in the prompt, ascending.
        """
        num_tokens = scores.shape[0]
        wanted = scores[held_tokens:].clone()
        at = torch.arange(held_tokens, num_tokens, device=scores.device)
        is_always = (at < self.sink_tokens) | (at >= num_tokens - self.recent_tokens)
        wanted[is_always] = math.inf
        # stable: of equal scores the later token is kept, on every machine
        order = wanted.flip(0).argsort(descending=True, stable=True)[: self.num_kept(len(wanted))]
        return (num_tokens - 1 - order).sort().values
