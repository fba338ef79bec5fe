"""Least squares of three non-negative coefficients, updated observation by observation. Compiled. Pure.

Relative errors are minimised, since a model of seconds should be as right for short prompts as for long ones. The prior
is a shape: how fast a machine is as a whole is taken from the first observations, and only the proportions of the
coefficients from the prior. Old observations fade by a constant factor, and so does the prior, down to a thousandth of
its weight: what is left of it decides only what no observation says.
"""

from typing import Any

import numpy as np

from core.compiled import compiled

_LEAST_PRIOR = 1e-3
_LEAST_SCALE_WEIGHT = 0.02


@compiled
def observe(
    gram: Any, moment: Any, state: Any, prior: Any, x: Any, y: float, weight: float, decay: float, out: Any
) -> None:
    """Fold in seconds y = x . beta, and solve.

    Changed in place: gram [3, 3], moment [3], out [3], and state [3] = (how much is left of the prior, logarithm of the
    speed against it, number of observations).
    """
    by_prior = x[0] * prior[0] + x[1] * prior[1] + x[2] * prior[2]
    state[2] += 1.0
    state[1] += max(1.0 / state[2], _LEAST_SCALE_WEIGHT) * (np.log(y / by_prior) - state[1])
    state[0] = max(_LEAST_PRIOR, state[0] * decay)
    speed = np.exp(state[1])
    expected = speed * by_prior if state[2] < 2.0 else x[0] * out[0] + x[1] * out[1] + x[2] * out[2]
    scale = 1.0 / max(expected, 0.1 * y) ** 2  # by what is expected: weights by what was seen would favour the small
    full = np.empty((3, 3))
    right = np.empty(3)
    for i in range(3):
        moment[i] = decay * moment[i] + scale * x[i] * y
        right[i] = moment[i]
        for j in range(3):
            gram[i, j] = decay * gram[i, j] + scale * x[i] * x[j]
            full[i, j] = gram[i, j]
        shape = prior[i] * speed
        trust = weight * state[0] / (shape * shape)
        full[i, i] += trust
        right[i] += trust * shape
    solve_non_negative(full, right, out)


@compiled
def solve_non_negative(gram: Any, moment: Any, out: Any) -> None:
    """Minimise beta' G beta / 2 - m' beta over beta >= 0: every set of coefficients that may be positive is tried."""
    best = 0.0
    scale = np.empty(3)
    for i in range(3):
        scale[i] = 1.0 / np.sqrt(max(gram[i, i], 1e-300))
    out[:] = 0.0
    beta = np.empty(3)
    for subset in range(1, 8):
        system = np.zeros((3, 4))
        for i in range(3):
            system[i, i] = 1.0
            if subset >> i & 1:
                system[i, 3] = moment[i] * scale[i]
                for j in range(3):
                    if subset >> j & 1:
                        system[i, j] = gram[i, j] * scale[i] * scale[j]
        for i in range(3):  # scaled and positive definite: no pivoting is needed
            for row in range(i + 1, 3):
                factor = system[row, i] / system[i, i]
                for column in range(i, 4):
                    system[row, column] -= factor * system[i, column]
        is_feasible = True
        for i in range(2, -1, -1):
            value = system[i, 3]
            for j in range(i + 1, 3):
                value -= system[i, j] * beta[j]
            beta[i] = value / system[i, i]
            is_feasible &= np.isfinite(beta[i]) and beta[i] >= 0.0
        if not is_feasible:
            continue
        objective = 0.0
        for i in range(3):
            objective -= 0.5 * beta[i] * moment[i] * scale[i]
        if objective < best:
            best = objective
            for i in range(3):
                out[i] = beta[i] * scale[i]
