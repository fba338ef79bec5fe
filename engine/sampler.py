"""Chooses the next token of every row of a batch of logits.

Whatever the batch, a row's choice depends only on its own logits, parameters, seen tokens and (seed, position): the
draw is an exponential race, arg max of probability / noise, with noise that is a hash of (seed, position, token). So a
generation that moves to another worker, or is recomputed after preemption, goes on exactly as it would have.
Rows pay for what they ask for: an all-greedy batch costs one arg max, filters and edits touch only the rows with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from core.request import SamplingParams, TokenLogprob
from engine.counter_random import TokenNoise, mix64, position_key
from engine.filters import filter_rows, largest, needs_filter
from engine.logit_edits import SeenTokens, add_bias, has_penalty, penalise, suppress


class SamplingState:
    """What sampling must remember of one generation; rebuilt from the prompt and the tokens so far at any time.

    Attributes:
        num_generated: index of the next token.
        is_plain: arg max of the model's own logits, always.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> None:
        self.params = params
        self.num_generated = 0
        self.mixed_seed = mix64(params.seed)
        counted = prompt_token_ids if params.repetition_penalty != 1 else ()
        self.seen = SeenTokens(counted) if has_penalty(params) else None
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self.end_token_ids = tuple(sorted(ends))
        self.is_plain = (
            params.is_greedy
            and self.seen is None
            and not params.logit_bias
            and params.logprobs is None
            and not (params.min_tokens and ends)
        )

    def add(self, token_id: int) -> None:
        """Take note of the token at position `num_generated`."""
        self.num_generated += 1
        if self.seen is not None:
            self.seen.add(token_id)

    @property
    def must_continue(self) -> bool:
        """Whether end tokens are suppressed at this position."""
        return self.num_generated < self.params.min_tokens and bool(self.end_token_ids)


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """Log-probabilities at one position, of the distribution before temperature and filters."""

    logprob: float
    top_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """One token per row; `details` has the rows that asked for log-probabilities."""

    token_ids: list[int]
    details: dict[int, TokenDetail]


_NO_DETAILS: dict[int, TokenDetail] = {}


class Sampler:
    """Stateless but for a table of hashes."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._noise = TokenNoise(vocab_size, device)

    def choose(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> Choices:
        """Choose a token per row; the states are not changed.

        Args:
            logits: float32 [R, V]; overwritten.
            states: of each row.
        """
        if all(state.is_plain for state in states):
            return Choices(_arg_max(logits), _NO_DETAILS)
        self._edit(logits, states)
        wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        logprobs = torch.log_softmax(_rows(logits, wanted), dim=1) if wanted else logits
        sampled = [row for row, state in enumerate(states) if not state.params.is_greedy]
        token_ids = _arg_max(logits) if len(sampled) < len(states) else [0] * len(states)
        if sampled:
            drawn = self._draw(_rows(logits, sampled), [states[row] for row in sampled])
            for row, token_id in zip(sampled, drawn, strict=True):
                token_ids[row] = token_id
        details = _details(logprobs, wanted, token_ids, states) if wanted else _NO_DETAILS
        return Choices(token_ids, details)

    def _edit(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
        counted = [(row, state.seen) for row, state in enumerate(states) if state.seen is not None]
        if counted:
            rows = [row for row, _ in counted]
            penalise(logits, rows, [states[row].params for row in rows], [seen for _, seen in counted])
        biased = [row for row, state in enumerate(states) if state.params.logit_bias]
        if biased:
            add_bias(logits, biased, [states[row].params for row in biased])
        endless = [row for row, state in enumerate(states) if state.must_continue]
        if endless:
            suppress(logits, endless, [states[row].end_token_ids for row in endless])

    def _draw(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        """Sample every row of `logits` [R, V], which is overwritten."""
        keys = [position_key(state.mixed_seed, state.num_generated) for state in states]
        temperatures = torch.tensor([state.params.temperature for state in states], dtype=torch.float32)
        # Shifted first: a tiny temperature must not turn the largest logit into infinity.
        logits = logits.sub_(logits.amax(dim=1, keepdim=True)).div_(temperatures[:, None].to(logits.device))
        probabilities = torch.softmax(logits, dim=1)
        token_ids = [0] * len(states)
        filtered = [row for row, state in enumerate(states) if needs_filter(state.params)]
        if filtered:
            groups = filter_rows(_rows(probabilities, filtered), [states[row].params for row in filtered])
            for group in groups:
                rows = [filtered[at] for at in group.rows]
                noise = self._noise.exponentials([keys[row] for row in rows], group.token_ids)
                winners = torch.tensor(_arg_max(group.weights.div_(noise)), device=logits.device)
                chosen = group.token_ids.gather(1, winners[:, None]).flatten().tolist()
                for row, token_id in zip(rows, chosen, strict=True):
                    token_ids[row] = token_id
        whole = [row for row, state in enumerate(states) if not needs_filter(state.params)]
        if whole:
            noise = self._noise.exponentials([keys[row] for row in whole])
            for row, token_id in zip(whole, _arg_max(_rows(probabilities, whole).div_(noise)), strict=True):
                token_ids[row] = token_id
        return token_ids


def _rows(matrix: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return a copy of some rows."""
    return matrix.clone() if len(rows) == len(matrix) else matrix[list(rows)]


def _arg_max(matrix: torch.Tensor) -> list[int]:
    """Return the id of the largest value of each row, the lowest of equals."""
    if matrix.device.type == "cpu":
        # An order of magnitude faster than torch's on this device.
        return cast(list[int], matrix.numpy().argmax(axis=1).tolist())
    return cast(list[int], matrix.argmax(dim=1).tolist())


def _details(
    logprobs: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], states: Sequence[SamplingState]
) -> dict[int, TokenDetail]:
    counts = [states[row].params.logprobs or 0 for row in rows]
    chosen = torch.tensor([token_ids[row] for row in rows], device=logprobs.device)
    own = logprobs.gather(1, chosen[:, None]).flatten().tolist()
    most = min(max(counts), logprobs.shape[1])
    values, ids = largest(logprobs, most, dead=-np.inf) if most else (logprobs[:, :0], logprobs[:, :0])
    details = {}
    for row, count, logprob, row_values, row_ids in zip(rows, counts, own, values.tolist(), ids.tolist(), strict=True):
        pairs = zip(row_ids[:count], row_values[:count], strict=True)
        details[row] = TokenDetail(logprob, tuple(TokenLogprob(token_id, value) for token_id, value in pairs))
    return details
