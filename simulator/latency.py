"""How long machines take: the truth that the router has to learn. Pure.

Source: DistServe (OSDI'24), profiles of its simulator: prefill = A + B*sum(len) + C*sum(len^2) and decode =
A + B*context + C*batch, with other coefficients for large batches; the quadratic term is kept here per pair of a
computed token and one before it, so that it holds for prompts of which a part is cached."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillLatency:
    """Seconds of one forward pass over pieces of prompts."""

    base_s: float
    per_token_s: float
    per_pair_s: float

    def step_s(self, pieces: Iterable[tuple[int, int]]) -> float:
        """Return the time for pieces of (tokens computed, tokens before them)."""
        return self.base_s + sum(self.piece_s(tokens, before) for tokens, before in pieces)

    def piece_s(self, tokens: int, before: int) -> float:
        """Return what a piece adds to a pass."""
        return self.per_token_s * tokens + self.per_pair_s * tokens * (before + tokens / 2)

    def prompt_s(self, tokens: int, before: int, chunk_tokens: int) -> float:
        """Return the time for one prompt alone, in chunks."""
        num_chunks = -(-tokens // chunk_tokens)
        return num_chunks * self.base_s + self.piece_s(tokens, before)


@dataclass(frozen=True, slots=True)
class StepLatency:
    """Seconds of one decode step: base + per_request * batch + per_context_token * context."""

    base_s: float
    per_request_s: float
    per_context_token_s: float


@dataclass(frozen=True, slots=True)
class DecodeLatency:
    """Decode steps. From `large_batch` requests on, `large` holds."""

    small: StepLatency
    large: StepLatency | None = None
    large_batch: int = 95

    def of_batch(self, batch: int) -> StepLatency:
        return self.large if self.large is not None and batch >= self.large_batch else self.small

    def step_s(self, batch: int, context_tokens: int) -> float:
        """Return the time of one step for a batch whose contexts sum up to so many tokens; 0 for none."""
        if batch == 0:
            return 0.0
        step = self.of_batch(batch)
        return step.base_s + step.per_request_s * batch + step.per_context_token_s * context_tokens


@dataclass(frozen=True, slots=True)
class LinkLatency:
    """A transfer: seconds per message, bytes per second, and how many layers the KV has, each sent when computed.

    `far_bytes_per_s`: between racks.
    """

    message_s: float
    bytes_per_s: float
    num_layers: int
    far_bytes_per_s: float = math.inf
