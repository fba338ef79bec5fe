"""Chooses the next token of every row of a batch of logits.

Whatever the batch, a row's choice depends only on its own logits, parameters, seen tokens and (seed, position): the
draw is an exponential race, arg max of probability / noise, with noise that is a hash of (seed, position, token). So a
generation that moves to another worker, or is recomputed after preemption, goes on exactly as it would have.
A row whose largest logit is not a finite number (the model's failure) gets no token and is named; no other row notices.
Rows pay for what they ask for: an all-greedy batch costs one arg max, filters and edits touch only the rows with them.
A row's mask, which says what its constraint allows, comes after penalties and bias: what it forbids has no probability,
in the log-probabilities too. Where min_tokens would forbid all that the mask allows, the mask wins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from core.request import SamplingParams
from engine.counter_random import TokenNoise, mix64, position_key
from engine.filters import filter_rows, needs_filter
from engine.logit_edits import LogitBias, SeenTokens, add_bias, has_penalty, penalise, suppress
from engine.logprobs import TokenDetail, token_details
from engine.masks import forbid, leaves_any

Masks = Mapping[int, NDArray[np.uint8]]


class SamplingState:
    """What sampling must remember of one generation; rebuilt from the prompt and the tokens so far at any time.

    Attributes:
        num_generated: index of the next token.
        bias, suppressed: the parameters' bias, and the end tokens below `min_tokens`, as arrays.
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
        self.suppressed = np.array(self.end_token_ids if params.min_tokens else (), np.int64)
        self.bias = LogitBias.of(params.logit_bias) if params.logit_bias else None
        self.is_plain = (
            params.is_greedy
            and self.seen is None
            and self.bias is None
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
class Choices:
    """One token per row.

    Attributes:
        token_ids: -1 in the rows that failed.
        details: of the rows that asked for log-probabilities.
        failed: rows without a finite largest logit, ascending.
        unknown: rows whose choice means nothing, because what their constraint allows is not known yet, or nothing.
    """

    token_ids: list[int]
    details: dict[int, TokenDetail]
    failed: tuple[int, ...] = ()
    unknown: frozenset[int] = frozenset()


_RACE_ELEMENTS = 2**17  # at once on a CPU: what stays in its caches
_NO_TOKEN = -1
_NO_DETAILS: dict[int, TokenDetail] = {}
_NO_MASKS: Masks = {}


class Sampler:
    """Stateless but for a table of hashes."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._noise = TokenNoise(vocab_size, device)

    def choose(self, logits: torch.Tensor, states: Sequence[SamplingState], masks: Masks = _NO_MASKS) -> Choices:
        """Choose a token per row; the states are not changed.

        Args:
            logits: float32 [R, V]; overwritten.
            states: of each row.
            masks: of rows with a constraint, a bit per token that may be chosen, the lowest first.
        """
        if not masks and all(state.is_plain for state in states):
            token_ids = _arg_max(logits)
            return Choices(token_ids, _NO_DETAILS, _failed(token_ids))
        self._edit(logits, states, masks)
        wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        logprobs = torch.log_softmax(_rows(logits, wanted), dim=1) if wanted else logits
        sampled = [row for row, state in enumerate(states) if not state.params.is_greedy]
        token_ids = _arg_max(logits) if len(sampled) < len(states) else [0] * len(states)
        if sampled:
            drawn = self._draw(_rows(logits, sampled), [states[row] for row in sampled])
            for row, token_id in zip(sampled, drawn, strict=True):
                token_ids[row] = token_id
        failed = _failed(token_ids)
        if failed and wanted:
            logprobs = logprobs[[at for at, row in enumerate(wanted) if row not in failed]]
            wanted = [row for row in wanted if row not in failed]
        if not wanted:
            return Choices(token_ids, _NO_DETAILS, failed)
        counts = [states[row].params.logprobs or 0 for row in wanted]
        details = token_details(logprobs, [token_ids[row] for row in wanted], counts)
        return Choices(token_ids, dict(zip(wanted, details, strict=True)), failed)

    def _edit(self, logits: torch.Tensor, states: Sequence[SamplingState], masks: Masks) -> None:
        counted = [(row, state.seen) for row, state in enumerate(states) if state.seen is not None]
        if counted:
            rows = [row for row, _ in counted]
            penalise(logits, rows, [states[row].params for row in rows], [seen for _, seen in counted])
        biased = [(row, state.bias) for row, state in enumerate(states) if state.bias is not None]
        if biased:
            add_bias(logits, [row for row, _ in biased], [bias for _, bias in biased])
        endless = [
            row
            for row, state in enumerate(states)
            if state.must_continue and (row not in masks or leaves_any(masks[row], state.suppressed))
        ]
        if endless:
            suppress(logits, endless, [states[row].suppressed for row in endless])
        if masks:
            forbid(logits, masks)

    def _draw(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        """Sample every row of `logits` [R, V], which is overwritten."""
        keys = [position_key(state.mixed_seed, state.num_generated) for state in states]
        temperatures = torch.tensor([state.params.temperature for state in states], dtype=torch.float32)
        # Shifted first: a tiny temperature must not turn the largest logit into infinity.
        logits = logits.sub_(logits.amax(dim=1, keepdim=True)).div_(temperatures[:, None].to(logits.device))
        # A row whose largest logit is not finite is all NaN from here on, which the race reports.
        probabilities = torch.softmax(logits, dim=1)
        token_ids = [0] * len(states)
        filtered = [row for row, state in enumerate(states) if needs_filter(state.params)]
        if filtered:
            kept = filter_rows(_rows(probabilities, filtered), [states[row].params for row in filtered])
            columns = self._race(kept.weights, [keys[row] for row in filtered], kept.token_ids)
            winners = torch.tensor(columns, device=logits.device).clamp_(min=0)
            drawn = kept.token_ids.gather(1, winners[:, None]).flatten().tolist()
            for row, column, token_id in zip(filtered, columns, drawn, strict=True):
                token_ids[row] = token_id if column != _NO_TOKEN else _NO_TOKEN
        whole = [row for row, state in enumerate(states) if not needs_filter(state.params)]
        if whole:
            drawn = self._race(_rows(probabilities, whole), [keys[row] for row in whole], None)
            for row, token_id in zip(whole, drawn, strict=True):
                token_ids[row] = token_id
        return token_ids

    def _race(self, weights: torch.Tensor, keys: Sequence[int], token_ids: torch.Tensor | None) -> list[int]:
        """Return the winning column of each row of `weights` [R, C], which is overwritten; -1 in a row of NaN."""
        rows = len(keys)
        if weights.device.type == "cpu":
            rows = max(1, _RACE_ELEMENTS // weights.shape[1])
        for start in range(0, len(keys), rows):
            part = slice(start, start + rows)
            noise = self._noise.exponentials(keys[part], None if token_ids is None else token_ids[part])
            weights[part] /= noise
        return _arg_max(weights)


def _rows(matrix: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows: the matrix itself if they are all, otherwise a copy."""
    return matrix if len(rows) == len(matrix) else matrix[list(rows)]


def _arg_max(matrix: torch.Tensor) -> list[int]:
    """Return the id of the largest value of each row, the lowest of equals; -1 if that value is not finite.

    A NaN counts as the largest, so looking at the winner alone finds it anywhere in the row.
    """
    if matrix.device.type == "cpu":
        values = matrix.numpy()  # an order of magnitude faster than torch on this device
        winners = values.argmax(axis=1)
        is_finite = np.isfinite(values[np.arange(len(winners)), winners])
        return cast(list[int], np.where(is_finite, winners, _NO_TOKEN).tolist())
    winners_there = matrix.argmax(dim=1)
    largest = matrix.gather(1, winners_there[:, None]).flatten()
    return cast(list[int], winners_there.masked_fill_(~largest.isfinite(), _NO_TOKEN).tolist())


def _failed(token_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(row for row, token_id in enumerate(token_ids) if token_id == _NO_TOKEN)
