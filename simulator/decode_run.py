"""A run of decode steps of an unchanging batch, in closed form. Pure.

Each step makes every context one token longer, so step k (from 0) takes first_s + k * growth_s, and n steps take
n * first_s + growth_s * n * (n - 1) / 2: a batch that runs undisturbed for a minute costs one event, not thousands."""

import math
from dataclasses import dataclass

from simulator.latency import DecodeLatency

_SLACK = 1e-9  # of a step: a boundary that rounding puts just before `elapsed_s` is that boundary


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Steps of one batch, the first taking `first_s`, each `growth_s` longer than the one before."""

    first_s: float
    growth_s: float

    @classmethod
    def of(cls, latency: DecodeLatency, batch: int, context_tokens: int) -> "DecodeRun":
        """Return the run of a batch whose contexts sum up to `context_tokens` before its first step."""
        assert batch > 0
        growth_s = latency.of_batch(batch).per_context_token_s * batch
        return cls(latency.step_s(batch, context_tokens), growth_s)

    def steps_s(self, num_steps: int) -> float:
        """Return how long the first `num_steps` take."""
        return num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def steps_until(self, elapsed_s: float) -> int:
        """Return the least number of whole steps that take at least `elapsed_s`: the next boundary from there."""
        if elapsed_s <= 0:
            return 0
        if self.growth_s > 0:
            half = self.first_s - self.growth_s / 2
            estimate = (math.sqrt(half * half + 2 * self.growth_s * elapsed_s) - half) / self.growth_s
        else:
            estimate = elapsed_s / self.first_s
        num_steps = max(0, math.ceil(estimate) - 1)
        while self.steps_s(num_steps) < elapsed_s - _SLACK * self.first_s:
            num_steps += 1
        return num_steps
