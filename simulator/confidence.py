"""How sure a mean over seeds is. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 % quantile by degrees of freedom.
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T_975_LARGE = 1.960


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % confidence interval (mean ± half)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.2g}"

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent runs and Student's interval; infinitely wide for one run."""
    assert values
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = _T_975[count - 2] if count - 2 < len(_T_975) else _T_975_LARGE
    return Estimate(mean, quantile * math.sqrt(variance / count), count)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Return the mean difference of runs that share their seeds: common noise cancels."""
    return estimate([one - other for one, other in zip(ours, theirs, strict=True)])


def cross_correlation(first: Sequence[float], second: Sequence[float], lag: int = 0) -> float:
    """Return Pearson's correlation of first[t] with second[t + lag]; 0 when either does not vary."""
    pairs = list(zip(first[: len(first) - lag] if lag else first, second[lag:], strict=False))
    if len(pairs) < 2:
        return 0.0
    mean_x = sum(x for x, _ in pairs) / len(pairs)
    mean_y = sum(y for _, y in pairs) / len(pairs)
    cov = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    var = sum((x - mean_x) ** 2 for x, _ in pairs) * sum((y - mean_y) ** 2 for _, y in pairs)
    return cov / math.sqrt(var) if var > 0 else 0.0
