"""Latency models found again from their own steps."""

import random

import pytest

from simulator.fit import fit_decode, fit_prefill, relative_error
from simulator.latency import PrefillLatency

_PREFILL = PrefillLatency(0.02, 1e-4, 2e-9)
_STEPS = [(tokens, before) for tokens in (16, 128, 512, 2048, 8192) for before in (0, 1024, 8192)]


def test_exact_steps_give_the_exact_model() -> None:
    fitted = fit_prefill([(tokens, before, _PREFILL.step_s([(tokens, before)])) for tokens, before in _STEPS])
    assert fitted.base_s == pytest.approx(_PREFILL.base_s)
    assert fitted.per_token_s == pytest.approx(_PREFILL.per_token_s)
    assert fitted.per_pair_s == pytest.approx(_PREFILL.per_pair_s)


def test_noisy_steps_give_nearly_the_model() -> None:
    rng = random.Random(3)
    exact = [_PREFILL.step_s([step]) for step in _STEPS * 20]
    measured = [seconds * rng.uniform(0.9, 1.1) for seconds in exact]
    fitted = fit_prefill([(*step, seconds) for step, seconds in zip(_STEPS * 20, measured, strict=True)])
    assert relative_error([fitted.step_s([step]) for step in _STEPS], exact[: len(_STEPS)]) < 0.03


def test_no_coefficient_is_negative() -> None:
    steps = [(batch, context, 0.01 + 1e-3 * batch - 1e-8 * context) for batch in (1, 8, 64) for context in (10, 10_000)]
    fitted = fit_decode(steps)
    assert fitted.per_context_token_s == 0.0
    assert (fitted.base_s, fitted.per_request_s) == pytest.approx((0.01, 1e-3), rel=0.1)
