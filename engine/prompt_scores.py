"""Log-probabilities of the tokens of a prompt, known chunk by chunk as the prompt is computed.

A token is judged by the model's own distribution at the position before it: sampling parameters play no part. The last
position's distribution belongs to the first generated token and the first token has none before it, so a prompt of P
tokens has P - 1 scores. A prompt that is taken from the prefix cache has no distributions; so it is computed, as far as
its scores are missing.
"""

import math
from collections.abc import Callable, Sequence

import torch

from core.request import PromptToken
from engine.logprobs import TokenDetail, token_details

_LOGITS_AT_ONCE = 2**24  # elements; 64 MiB


class PromptScores:
    """The scores of one prompt.

    Attributes:
        num_known: leading positions whose distribution was looked at.
        are_finite: false once the model computed a distribution that is none.
    """

    def __init__(self, token_ids: Sequence[int], num_top: int) -> None:
        self.num_top = num_top
        self.num_known = 0
        self.are_finite = True
        self._tokens = [PromptToken(token_ids[0], None)]
        self._token_ids = token_ids

    def missing(self, start: int, stop: int) -> range:
        """Return which of the positions from `start` to `stop` are to be looked at when they are computed."""
        first = max(start, self.num_known)
        return range(first, max(first, min(stop, len(self._token_ids) - 1)))

    def following(self, positions: range) -> Sequence[int]:
        """Return the tokens that the distributions at these positions judge."""
        return self._token_ids[positions.start + 1 : positions.stop + 1]

    def add(self, details: Sequence[TokenDetail]) -> None:
        """Take what is known of the next positions."""
        for detail in details:
            self.num_known += 1
            self.are_finite = self.are_finite and not math.isnan(detail.logprob)
            token_id = self._token_ids[self.num_known]
            self._tokens.append(PromptToken(token_id, detail.logprob, detail.top_logprobs))

    def result(self) -> tuple[PromptToken, ...]:
        """Return the whole prompt, scored; the whole was computed."""
        assert self.num_known == len(self._token_ids) - 1, "the prompt was not computed to its end"
        return tuple(self._tokens)


def details_of(
    states: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    token_ids: Sequence[int],
    counts: Sequence[int],
    vocab_size: int,
) -> list[TokenDetail]:
    """Return what the distributions at some positions say of the tokens that follow them.

    The logits of a long chunk would be larger than the model's activations by far, so they are made and read in pieces.

    Args:
        states: [R, hidden size].
        logits: makes float32 [r, V] of rows of them.
        token_ids: that follow.
        counts: of alternatives wanted at each position.
    """
    size = max(1, _LOGITS_AT_ONCE // vocab_size)
    details: list[TokenDetail] = []
    for start in range(0, len(token_ids), size):
        part = slice(start, start + size)
        logprobs = torch.log_softmax(logits(states[part]), dim=1)
        details += token_details(logprobs, token_ids[part], counts[part])
    return details
