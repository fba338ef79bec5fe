"""Changes to logits before a token is chosen: penalties, bias, suppressed tokens.

In this order: repetition, frequency and presence penalties on the model's logits, then the bias, then suppression.
Sparse: only the tokens that a row has seen or names are touched, whatever the size of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.request import SamplingParams


class SeenTokens:
    """The distinct tokens of one generation with their counts among the generated ones; grows a token at a time."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        """Prompt tokens count as seen, not as generated; leave them out where only generated ones matter."""
        distinct = dict.fromkeys(prompt_token_ids)
        self._index = {token_id: at for at, token_id in enumerate(distinct)}
        self._ids = np.zeros(len(distinct) + 64, np.int64)
        self._ids[: len(distinct)] = list(distinct)
        self._counts = np.zeros(len(self._ids), np.float32)

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        at = self._index.setdefault(token_id, len(self._index))
        if at == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[at] = token_id
        self._counts[at] += 1.0

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct tokens; a view."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated; a view."""
        return self._counts[: len(self._index)]


@dataclass(frozen=True, slots=True, eq=False)
class LogitBias:
    """A request's bias, int64 ids and float32 values; made once, because it may be long and steps are many."""

    token_ids: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def of(cls, bias: Mapping[int, float]) -> "LogitBias":
        return cls(np.array(list(bias.keys()), np.int64), np.array(list(bias.values()), np.float32))


def has_penalty(sampling: SamplingParams) -> bool:
    """Say whether seen tokens must be counted."""
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1


def penalise(
    logits: torch.Tensor, rows: Sequence[int], params: Sequence[SamplingParams], seen: Sequence[SeenTokens]
) -> None:
    """Apply the three penalties to `rows` of float32 [R, V] `logits`, in place."""
    lengths = [len(tokens.ids) for tokens in seen]
    device = logits.device
    at = (_repeat(rows, lengths, device), torch.from_numpy(np.concatenate([tokens.ids for tokens in seen])).to(device))
    counts = torch.from_numpy(np.concatenate([tokens.counts for tokens in seen])).to(device)
    repetition = _repeat([float(row.repetition_penalty) for row in params], lengths, device)
    frequency = _repeat([float(row.frequency_penalty) for row in params], lengths, device)
    presence = _repeat([float(row.presence_penalty) for row in params], lengths, device)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - frequency * counts - presence * (counts > 0)


def add_bias(logits: torch.Tensor, rows: Sequence[int], biases: Sequence[LogitBias]) -> None:
    """Add each row's logit bias, in place."""
    lengths = [len(bias.token_ids) for bias in biases]
    token_ids = torch.from_numpy(np.concatenate([bias.token_ids for bias in biases])).to(logits.device)
    values = torch.from_numpy(np.concatenate([bias.values for bias in biases])).to(logits.device)
    logits[_repeat(rows, lengths, logits.device), token_ids] += values  # no (row, token) comes twice


def suppress(logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[NDArray[np.int64]]) -> None:
    """Make each row's `token_ids` impossible, in place."""
    lengths = [len(ids) for ids in token_ids]
    columns = torch.from_numpy(np.concatenate(token_ids)).to(logits.device)
    logits[_repeat(rows, lengths, logits.device), columns] = -torch.inf


def _repeat(values: Sequence[int] | Sequence[float], lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return value i lengths[i] times; int64 or float32."""
    kind = np.float32 if isinstance(values[0], float) else np.int64
    return torch.from_numpy(np.repeat(np.asarray(values, kind), lengths)).to(device)
