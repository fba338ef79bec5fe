"""Sampling ranges and request ids: refused by name."""

import math
import random
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.ids import new_nonce, new_request_id, parse_request_id, transfer_id
from core.request import SamplingParams
from kv_transfer.frame import MAX_TRANSFER_ID_BYTES

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 1e-50),
    ("temperature", 0.0009),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-40),
    ("repetition_penalty", 100.1),
    ("top_k", -1),
    ("top_k", math.inf),
    ("max_tokens", 0),
    ("max_tokens", math.inf),
    ("min_tokens", 17),
    ("seed", -1),
    ("seed", 2**64),
    ("logprobs", 21),
    ("stop", ("",)),
    ("stop", tuple("abcdefghijklmnopq")),
    ("stop", ("a" * 1025,)),
    ("stop_token_ids", (100,)),
    ("stop_token_ids", (1,) * 1025),
    ("logit_bias", {100: 1.0}),
    ("logit_bias", {1: 101.0}),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{field}={value!r:.12}" for field, value in BAD])
def test_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check(vocab_size=100)
    assert caught.value.field == f"sampling.{field}"


def test_all_that_is_wrong_is_told_at_once_and_each_field_once() -> None:
    bad = SamplingParams(top_p=2, max_tokens=0, stop_token_ids=(100, 200), logit_bias={1: 101.0, 2: 102.0})
    with pytest.raises(InvalidRequest) as caught:
        bad.check(vocab_size=100)
    names = ["top_p", "max_tokens", "stop_token_ids", "logit_bias"]
    assert [field for field, _ in caught.value.violations] == [f"sampling.{name}" for name in names]
    assert str(caught.value).startswith("sampling.top_p: must be in (0, 1], got 2; sampling.max_tokens: ")


def test_the_edges_are_allowed() -> None:
    SamplingParams(
        temperature=0, top_p=1, min_p=1, min_tokens=16, seed=2**64 - 1, logprobs=20, logit_bias={99: -100}
    ).check(vocab_size=100)
    SamplingParams(temperature=0.001, repetition_penalty=0.01).check(vocab_size=100)
    SamplingParams(temperature=100, repetition_penalty=100).check(vocab_size=100)


def test_sizes_up_to_the_bounds_are_allowed() -> None:
    SamplingParams(
        stop=("a" * 1024,) * 16, stop_token_ids=tuple(range(1024)), logit_bias=dict.fromkeys(range(1024), 1.0)
    ).check(vocab_size=2000)


def test_too_many_biases_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 1024") as caught:
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)).check(vocab_size=2000)
    assert caught.value.field == "sampling.logit_bias"


def test_small_temperatures_are_told_what_is_allowed() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.temperature: must be 0 \(greedy\) or in \[0\.001, 100\]"):
        SamplingParams(temperature=1e-50).check(vocab_size=100)


@pytest.mark.parametrize("text", ["", "a" * 129, "a b", "a/b", "a\n", "é"])
def test_bad_request_ids_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="request_id"):
        parse_request_id(text)


def test_made_ids_are_fresh_and_valid() -> None:
    made = {new_request_id() for _ in range(100)}
    assert len(made) == 100
    assert all(parse_request_id(one) == one for one in made)


def test_a_transfer_is_named_once_per_admission_and_attempt_and_fits_a_frame() -> None:
    rng = random.Random(0)
    longest = parse_request_id("x" * 128)
    first, second = new_nonce(rng), new_nonce(rng)
    named = [transfer_id(longest, attempt, nonce) for attempt in (0, 10**9) for nonce in (first, second)]
    assert len(set(named)) == 4
    assert max(len(one.encode()) for one in named) <= MAX_TRANSFER_ID_BYTES
