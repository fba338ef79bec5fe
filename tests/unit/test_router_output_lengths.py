"""Quantiles of history: the pinball loss, what is known of a request, what it has produced already."""

import random
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.service_class import ServiceClass
from router.admission.config import OutputLengthsConfig
from router.admission.output_lengths import LengthKey, OutputLengths

CONFIG = OutputLengthsConfig(window=64, min_samples=8, max_histories=32, forget_after_s=100.0)
KEY = LengthKey("t", ServiceClass.INTERACTIVE, 4096)


def known(lengths: list[int], key: LengthKey = KEY) -> OutputLengths:
    history = OutputLengths(CONFIG, 50)
    for length in lengths:
        history.record(key, length, 0.0)
    return history


def pinball_loss(lengths: list[int], guess: float, q: float) -> float:
    return sum(q * max(0.0, length - guess) + (1 - q) * max(0.0, guess - length) for length in lengths)


LENGTHS = st.lists(st.integers(1, 4096), min_size=8, max_size=64)
Q = st.floats(0.01, 1.0)


@given(lengths=LENGTHS, q=Q, other=st.integers(1, 4096))
@settings(deadline=None)
def test_no_other_guess_has_less_pinball_loss(lengths: list[int], q: float, other: int) -> None:
    guess = known(lengths).quantile(KEY, q)
    assert pinball_loss(lengths, guess, q) <= pinball_loss(lengths, other, q) + 1e-6


@given(lengths=LENGTHS, q=Q, generated=st.integers(0, 4000), other=st.integers(1, 4096))
@settings(deadline=None)
def test_what_was_produced_leaves_only_longer_ones(lengths: list[int], q: float, generated: int, other: int) -> None:
    guess = known(lengths).quantile(KEY, q, generated)
    assert generated < guess <= max(4096, generated + 1)
    longer = [length for length in lengths if length > generated]
    if longer:
        assert guess == sorted(longer)[ceil(q * len(longer)) - 1]
        assert pinball_loss(longer, guess, q) <= pinball_loss(longer, other, q) + 1e-6


@given(lengths=LENGTHS, low=Q, high=Q, generated=st.integers(0, 4000), later=st.integers(0, 4000))
@settings(deadline=None)
def test_it_grows_with_the_quantile_and_with_what_was_produced(
    lengths: list[int], low: float, high: float, generated: int, later: int
) -> None:
    history = known(lengths)
    low, high = sorted((low, high))
    assert history.quantile(KEY, low, generated) <= history.quantile(KEY, high, generated)
    generated, later = sorted((generated, later))
    if any(length > later for length in lengths):
        assert history.quantile(KEY, low, generated) <= history.quantile(KEY, low, later)


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = random.Random(2)
    history = OutputLengths(OutputLengthsConfig(window=256), 50)
    draws = [max(1, int(rng.lognormvariate(5.0, 1.0))) for _ in range(3_000)]
    num_within = 0
    for number, length in enumerate(draws):
        if number >= 256:
            num_within += length <= history.quantile(KEY, 0.9)
        history.record(KEY, length, float(number))
    assert num_within / (len(draws) - 256) == pytest.approx(0.9, abs=0.02)


def test_the_narrowest_history_with_enough_samples_answers() -> None:
    history = OutputLengths(CONFIG, 50)
    assert history.quantile(KEY, 0.5) == 50, "nothing is known"
    assert history.quantile(LengthKey("t", ServiceClass.INTERACTIVE, 20), 0.5) == 20, "nor could it be longer"

    def add(tenant: str, service_class: ServiceClass, max_tokens: int, length: int, times: int = 8) -> None:
        for _ in range(times):
            history.record(LengthKey(tenant, service_class, max_tokens), length, 0.0)

    add("x", ServiceClass.BATCH, 64, 10)
    assert history.quantile(KEY, 0.5) == 10, "all requests"
    add("x", ServiceClass.INTERACTIVE, 64, 20)
    assert history.quantile(KEY, 0.5) == 20, "of the class"
    add("x", ServiceClass.INTERACTIVE, 5000, 30)
    assert history.quantile(KEY, 0.5) == 30, "of the class and the asked length, by powers of two"
    add("t", ServiceClass.INTERACTIVE, 64, 40)
    assert history.quantile(KEY, 0.5) == 40, "of the tenant and class"
    add("t", ServiceClass.INTERACTIVE, 4096, 60, times=7)
    assert history.quantile(KEY, 0.5) == 40, "not enough of all three yet"
    add("t", ServiceClass.INTERACTIVE, 4096, 60, times=1)
    assert history.quantile(KEY, 0.5) == 60
    assert history.quantile(KEY, 0.5, generated=60) == 120, "nobody got that far: as long again"


def test_the_latest_count() -> None:
    history = known([10] * 64)
    for _ in range(64):
        history.record(KEY, 500, 1.0)
    assert history.quantile(KEY, 0.01) == 500, "the window holds 64"
    history.record(KEY, 7, 200.0)
    assert history.quantile(KEY, 1.0) == 7, "the others are too old"


def test_memory_is_bounded() -> None:
    history = OutputLengths(CONFIG, 50)
    for number in range(10_000):
        history.record(LengthKey(f"tenant {number % 97}", ServiceClass.BATCH, 1 << (number % 12)), number, 0.0)
    assert len(history) <= 32
    assert history.num_samples <= 32 * 64
