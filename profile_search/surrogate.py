"""The surrogate: a Gaussian process that guesses the quality of candidates that nobody asked the model about.

Matern-3/2 with white noise over one-hot traits, nominal bits of K and of V, and the measured ratio. It learns the
logarithm of the disagreement's upper bound, which is close to linear in bits, with the noise that the number of judged
prompts leaves. Needs scikit-learn (the extra `profiles`). Source of the method: KVServe's profiling engine (GP over
one-hot candidates, constraint-aware acquisition), rebuilt on confidence bounds instead of accuracies.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from profile_search.candidates import Candidate
from profile_search.scores import PromptScore, disagreement

_LEAST = 1e-3  # disagreements below are all alike
_Z = 1.96
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Guess:
    """Of the log disagreement bound, per candidate: mean and standard deviation."""

    mean: Floats
    std: Floats

    def feasible(self, floor: float) -> Floats:
        """Return the probability that the lower confidence bound of agreement reaches `floor`. Pure."""
        reach = (_log(1.0 - floor) - self.mean) / np.maximum(self.std, 1e-9)
        return np.array([0.5 * (1.0 + math.erf(at / math.sqrt(2.0))) for at in reach])


def features_of(candidates: Sequence[Candidate], ratios: Sequence[float]) -> Floats:
    """Return one row per candidate: numbers scaled to [0, 1], traits one-hot. Pure."""
    numbers = np.array([(*c.coarseness, np.log(r)) for c, r in zip(candidates, ratios, strict=True)], dtype=np.float64)
    span = np.maximum(numbers.max(axis=0) - numbers.min(axis=0), 1e-9)
    traits = sorted({trait for candidate in candidates for trait in candidate.traits})
    one_hot = np.array([[float(trait in candidate.traits) for trait in traits] for candidate in candidates])
    return np.hstack([(numbers - numbers.min(axis=0)) / span, 0.5 * one_hot])


def guess(
    features: Floats, observed: Sequence[int], scores: Sequence[Sequence[PromptScore]], num_prompts: int
) -> Guess:
    """Fit to the candidates `observed` (rows of `features`) with their scores, and guess all rows.

    Args:
        num_prompts: with which candidates are accepted: the guessed bound is the one that they would have then.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    except ImportError as error:
        raise ConfigError("profile search needs scikit-learn and matplotlib: pip install 'tandem[profiles]'") from error
    bounds, noise = [], []
    for rows in scores:
        ratio, error_final = disagreement(rows, num_prompts)
        _, error_now = disagreement(rows, len(rows))
        bound = ratio + _Z * error_final
        bounds.append(_log(bound))
        noise.append((error_now / (bound + _LEAST)) ** 2)
    kernel: Any = ConstantKernel(1.0, (0.05, 50.0)) * Matern(0.7, (0.1, 20.0), nu=1.5) + WhiteKernel(0.01, (1e-4, 0.5))
    targets = np.array(bounds)
    spread = max(float(targets.std()), 0.1)
    process = GaussianProcessRegressor(
        kernel, alpha=np.array(noise) / spread**2 + 1e-8, n_restarts_optimizer=1, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its limit is an answer too
        process.fit(features[list(observed)], (targets - targets.mean()) / spread)
        mean, std = process.predict(features, return_std=True)
    return Guess(mean * spread + targets.mean(), std * spread)


def _log(disagreed: float) -> float:
    return float(np.log(disagreed + _LEAST))
