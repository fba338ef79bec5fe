"""Latency models from measured steps: least squares of the relative error, no coefficient below zero. Pure.

Source: DistServe (OSDI'24), the recipe of its profiler: by relative errors short steps count as much as long ones."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.latency import PrefillLatency, StepLatency


def fit_prefill(steps: Sequence[tuple[int, int, float]]) -> PrefillLatency:
    """Fit steps of (tokens computed, tokens before them, seconds), one prompt each."""
    rows = [(1.0, tokens, tokens * (before + tokens / 2)) for tokens, before, _ in steps]
    return PrefillLatency(*_fit(rows, [seconds for *_, seconds in steps]))


def fit_decode(steps: Sequence[tuple[int, int, float]]) -> StepLatency:
    """Fit steps of (requests in the batch, tokens of their contexts together, seconds)."""
    rows = [(1.0, batch, context) for batch, context, _ in steps]
    return StepLatency(*_fit(rows, [seconds for *_, seconds in steps]))


def relative_error(predicted_s: Sequence[float], measured_s: Sequence[float]) -> float:
    """Return the root of the mean square of predicted / measured - 1."""
    ratios = np.asarray(predicted_s) / np.asarray(measured_s) - 1
    return float(np.sqrt(np.mean(ratios**2)))


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Drop the most negative coefficient until none is left: with three of them that is exact enough."""
    matrix: NDArray[np.float64] = np.asarray(rows, dtype=np.float64) / np.asarray(seconds)[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if len(kept) == 1 or found.min() >= 0:
            break
        del kept[int(found.argmin())]
    coefficients = np.zeros(matrix.shape[1])
    coefficients[kept] = np.maximum(found, 0.0)
    return tuple(float(one) for one in coefficients)
