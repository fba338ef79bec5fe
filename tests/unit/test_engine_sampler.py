"""The sampler against a naive reference, one feature at a time and mixed; distribution; independence of the batch."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.request import SamplingParams
from engine.counter_random import TokenNoise, mix32, mix64, position_key
from engine.logprobs import largest
from engine.sampler import Sampler, SamplingState

VOCAB_SIZE = 203
EOS = (7, 8)


def make_state(params: SamplingParams, prompt: list[int], generated: list[int]) -> SamplingState:
    state = SamplingState(params, prompt, EOS)
    for token in generated:
        state.add(token)
    return state


def naive_logits(
    row: NDArray[np.float32], params: SamplingParams, prompt: list[int], generated: list[int]
) -> NDArray[np.float32]:
    """Penalties, bias, suppression, token by token."""
    row = row.copy()
    for token in set(prompt) | set(generated):
        value, count = row[token], np.float32(generated.count(token))
        scale = np.float32(params.repetition_penalty)
        value = value / scale if value > 0 else value * scale
        value -= np.float32(params.frequency_penalty) * count
        row[token] = value - (np.float32(params.presence_penalty) if count else np.float32(0))
    for token, bias in params.logit_bias.items():
        row[token] += np.float32(bias)
    if len(generated) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else EOS)):
            row[token] = -np.inf
    return row


def naive_kept(probabilities: NDArray[np.float32], params: SamplingParams) -> set[int]:
    """The tokens that the filters leave, by sorting everything."""
    order = sorted(range(VOCAB_SIZE), key=lambda token: (-probabilities[token], token))
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        total = float(np.sum(probabilities[order], dtype=np.float64)) if params.top_k else 1.0
        mass, kept = 0.0, []
        for token in order:
            kept.append(token)
            mass += float(probabilities[token])
            if mass >= params.top_p * total:
                break
        order = kept
    return {token for token in order if probabilities[token] >= params.min_p * probabilities[order[0]]}


def naive_choice(row: NDArray[np.float32], params: SamplingParams, prompt: list[int], generated: list[int]) -> int:
    edited = naive_logits(row, params, prompt, generated)
    if params.temperature == 0:
        return int(edited.argmax())
    scaled = torch.from_numpy((edited - edited.max()) / np.float32(params.temperature))
    probabilities = torch.softmax(scaled, 0).numpy()
    noise = TokenNoise(VOCAB_SIZE).exponentials([position_key(mix64(params.seed), len(generated))])[0].numpy()
    kept = naive_kept(probabilities, params)
    race = [probabilities[token] / noise[token] if token in kept else -1.0 for token in range(VOCAB_SIZE)]
    return int(np.argmax(race))


FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "nearly-greedy": {"temperature": 1e-3},
    "top-k": {"top_k": 5},
    "top-k-1": {"top_k": 1},
    "top-k-wide": {"top_k": 150},
    "top-k-all": {"top_k": 10_000},
    "top-p": {"top_p": 0.7},
    "top-p-wide": {"top_p": 0.999, "temperature": 5.0},
    "top-p-tiny": {"top_p": 1e-9},
    "min-p": {"min_p": 0.05},
    "min-p-wide": {"min_p": 0.001, "temperature": 5.0},
    "top-k-top-p": {"top_k": 20, "top_p": 0.6},
    "wide-top-k-top-p": {"top_k": 120, "top_p": 0.9, "temperature": 4.0},
    "all-filters": {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "repetition": {"repetition_penalty": 1.3},
    "repetition-reward": {"repetition_penalty": 0.7, "temperature": 0.0},
    "bias": {"logit_bias": {3: 5.0, 9: -100.0, 100: 2.0}},
    "min-tokens": {"min_tokens": 50, "max_tokens": 60, "stop_token_ids": (1, 2), "temperature": 0.0},
    "min-tokens-ignore-eos": {"min_tokens": 50, "max_tokens": 60, "ignore_eos": True, "stop_token_ids": (1,)},
    "everything": {
        "temperature": 0.8,
        "top_k": 90,
        "top_p": 0.95,
        "min_p": 0.001,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {5: 3.0},
        "min_tokens": 50,
        "max_tokens": 60,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_choice_equals_the_naive_reference(feature: str) -> None:
    generator = np.random.default_rng(1)
    sampler = Sampler(VOCAB_SIZE)
    for seed in range(30):
        params = SamplingParams(seed=seed, **FEATURES[feature])
        row = generator.normal(scale=2, size=VOCAB_SIZE).astype(np.float32)
        prompt = generator.integers(0, VOCAB_SIZE, 20).tolist()
        generated = generator.integers(0, 12, int(generator.integers(0, 40))).tolist()
        choice = sampler.choose(torch.from_numpy(row.copy())[None], [make_state(params, prompt, generated)])
        assert choice.token_ids == [naive_choice(row, params, prompt, generated)]


@pytest.mark.parametrize("feature", ["greedy", "top-k", "top-k-wide", "top-p", "top-p-wide", "min-p", "all-filters"])
def test_ties_go_to_the_lowest_ids(feature: str) -> None:
    """Logits of few distinct values, as bfloat16 makes them: the filters' borders cut through ties."""
    generator = np.random.default_rng(2)
    sampler = Sampler(VOCAB_SIZE)
    for seed in range(30):
        params = SamplingParams(seed=seed, **FEATURES[feature])
        row = generator.integers(0, 6, VOCAB_SIZE).astype(np.float32)
        choice = sampler.choose(torch.from_numpy(row.copy())[None], [make_state(params, [], [])])
        assert choice.token_ids == [naive_choice(row, params, [], [])]


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = np.random.default_rng(3)
    sampler = Sampler(VOCAB_SIZE)
    all_params = [
        SamplingParams(seed=seed, logprobs=(None, 0, 4)[seed % 3], **feature)
        for seed, feature in enumerate(FEATURES.values())
    ]
    logits = torch.from_numpy(generator.normal(scale=2, size=(len(all_params), VOCAB_SIZE)).astype(np.float32))
    prompts = [generator.integers(0, VOCAB_SIZE, 20).tolist() for _ in all_params]
    generated = [generator.integers(0, 12, seed).tolist() for seed in range(len(all_params))]
    states = [make_state(*parts) for parts in zip(all_params, prompts, generated, strict=True)]
    together = sampler.choose(logits.clone(), states)
    for row, state in enumerate(states):
        alone = sampler.choose(logits[row : row + 1].clone(), [state])
        assert alone.token_ids == [together.token_ids[row]]
        assert alone.details.get(0) == together.details.get(row)
    order = generator.permutation(len(states)).tolist()
    shuffled = sampler.choose(logits[order].clone(), [states[row] for row in order])
    assert shuffled.token_ids == [together.token_ids[row] for row in order]


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        (SamplingParams(), 6),
        (SamplingParams(temperature=0.5), 6),
        (SamplingParams(top_k=3), 3),
        (SamplingParams(top_p=0.8), 4),
    ],
    ids=["plain", "cold", "top-k", "top-p"],
)
def test_distribution_over_seeds_and_positions(params: SamplingParams, tokens: int) -> None:
    """Chi-square of 20,000 draws; the numbers are fixed, so this either always passes or never."""
    probabilities = np.array([0.4, 0.25, 0.14, 0.11, 0.07, 0.03])
    logits = np.full(VOCAB_SIZE, -np.inf, np.float32)
    places = [11, 3, 99, 50, 200, 120]
    logits[places] = np.log(probabilities)
    sampler = Sampler(VOCAB_SIZE)
    counts = np.zeros(VOCAB_SIZE)
    rows, positions = 200, 100
    states = [make_state(dataclasses.replace(params, seed=seed), [], []) for seed in range(rows)]
    for _ in range(positions):
        drawn = sampler.choose(torch.from_numpy(np.tile(logits, (rows, 1))), states).token_ids
        counts += np.bincount(drawn, minlength=VOCAB_SIZE)
        for state, token in zip(states, drawn, strict=True):
            state.add(token)
    expected = probabilities ** (1 / params.temperature)
    expected[tokens:] = 0
    expected *= rows * positions / expected.sum()
    assert counts[places].sum() == rows * positions
    assert not counts[places][tokens:].any()
    chi_square = ((counts[places] - expected)[:tokens] ** 2 / expected[:tokens]).sum()
    assert chi_square < 20.5  # 0.1 % quantile of 5 degrees of freedom


def test_noise_is_exponential_and_uncorrelated() -> None:
    keys = [position_key(mix64(seed), position) for seed in range(20) for position in range(20)]
    noise = TokenNoise(1000).exponentials(keys).double().numpy()
    assert noise.min() > 0
    assert abs(noise.mean() - 1) < 0.01
    assert abs(noise.var() - 1) < 0.02
    for quantile in (1e-4, 0.01, 0.5, 0.99):
        share = (noise < -np.log1p(-quantile)).mean()
        assert abs(share - quantile) < 5 * np.sqrt(quantile / noise.size)
    flat = noise - noise.mean()
    neighbours = [(flat[:, 1:] * flat[:, :-1]).mean(), (flat[1:] * flat[:-1]).mean(), (flat[20:] * flat[:-20]).mean()]
    assert max(map(abs, neighbours)) < 0.01


def test_noise_of_some_tokens_is_that_of_all() -> None:
    noise = TokenNoise(1000)
    token_ids = torch.tensor([[5, 999, 0], [1, 2, 3]])
    whole = noise.exponentials([12345, 2**64 - 1])
    assert torch.equal(noise.exponentials([12345, 2**64 - 1], token_ids), whole.gather(1, token_ids))


def test_signed_arithmetic_of_the_noise_equals_unsigned() -> None:
    """The device computes in int32; the definition is in uint32."""
    key = 0xFEDCBA9876543210
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    bits = mix32(np.arange(1, 501, dtype=np.uint32)) + low
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> np.uint32(15)
    bits += high
    bits *= np.uint32(0x846CA68B)
    uniform = ((bits & np.uint32(0x7FFFFFFF)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-31)
    expected = -np.log1p(-np.minimum(uniform, 1 - 2**-24))
    np.testing.assert_allclose(TokenNoise(500).exponentials([key])[0].numpy(), expected, rtol=1e-5)


def test_logprobs_are_of_the_edited_distribution_before_temperature_and_filters() -> None:
    generator = np.random.default_rng(4)
    row = generator.normal(scale=2, size=VOCAB_SIZE).astype(np.float32)
    params = SamplingParams(temperature=0.2, top_k=1, logprobs=5, frequency_penalty=1.0, logit_bias={3: 4.0}, seed=1)
    generated = [1, 1, 2]
    choices = Sampler(VOCAB_SIZE).choose(torch.from_numpy(row.copy())[None], [make_state(params, [], generated)])
    edited = naive_logits(row, params, [], generated).astype(np.float64)
    expected = edited - np.log(np.exp(edited).sum())
    detail = choices.details[0]
    assert detail.logprob == pytest.approx(expected[choices.token_ids[0]], abs=1e-5)
    order = np.argsort(-expected)[:5]
    assert [top.token_id for top in detail.top_logprobs] == order.tolist()
    assert [top.logprob for top in detail.top_logprobs] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_logprobs_0_gives_the_chosen_token_only() -> None:
    params = SamplingParams(temperature=0.0, logprobs=0)
    logits = torch.zeros(2, VOCAB_SIZE)
    choices = Sampler(VOCAB_SIZE).choose(logits, [make_state(params, [], []), make_state(SamplingParams(), [], [])])
    assert list(choices.details) == [0]
    assert choices.details[0].logprob == pytest.approx(-np.log(VOCAB_SIZE))
    assert choices.details[0].top_logprobs == ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=1, max_size=4), st.integers(1, 12))
def test_largest_orders_by_value_then_id(rows: list[list[int]], count: int) -> None:
    values, ids = largest(torch.tensor(rows, dtype=torch.float32), count)
    for row, row_values, row_ids in zip(rows, values.tolist(), ids.tolist(), strict=True):
        expected = sorted(range(12), key=lambda at: (-row[at], at))[:count]
        assert row_ids == expected
        assert row_values == [row[at] for at in expected]


def test_seen_tokens_grow_beyond_their_first_room() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    state = make_state(params, [], [])
    for token in [*range(VOCAB_SIZE), 0, 0]:
        state.add(token)
    assert state.seen is not None
    assert state.seen.ids.tolist() == list(range(VOCAB_SIZE))
    assert state.seen.counts.tolist() == [3.0] + [1.0] * (VOCAB_SIZE - 1)


BAD_ROWS = {
    "a-nan": lambda row: row.__setitem__(57, np.nan),
    "all-nan": lambda row: row.fill(np.nan),
    "infinity": lambda row: row.__setitem__(57, np.inf),
    "nothing-possible": lambda row: row.fill(-np.inf),
}


@pytest.mark.parametrize("spoil", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_row_without_finite_numbers_fails_alone(
    feature: str, logprobs: int | None, spoil: Callable[[NDArray[np.float32]], None]
) -> None:
    """Alone, with its like, and among rows of every kind: the others choose what they choose without it."""
    sampler = Sampler(VOCAB_SIZE)
    generator = np.random.default_rng(6)
    logits = generator.normal(scale=2, size=(len(FEATURES) + 2, VOCAB_SIZE)).astype(np.float32)
    good = [SamplingParams(seed=1, **fields) for fields in FEATURES.values()]
    bad = SamplingParams(logprobs=logprobs, **FEATURES[feature])
    states = [make_state(params, [1, 2], [3]) for params in (bad, *good, bad)]
    expected = sampler.choose(torch.from_numpy(logits[1:-1].copy()), states[1:-1])
    spoil(logits[0])
    spoil(logits[-1])
    choices = sampler.choose(torch.from_numpy(logits.copy()), states)
    assert choices.failed == (0, len(states) - 1)
    assert choices.token_ids[1:-1] == expected.token_ids
    assert not choices.details
    for rows in ([0], [0, len(states) - 1]):
        assert sampler.choose(torch.from_numpy(logits[rows]), [states[row] for row in rows]).failed == tuple(
            range(len(rows))
        )
    assert not expected.failed


def test_biases_and_end_tokens_are_read_once_per_request() -> None:
    """Up to a thousand each: a step must not walk through them again."""

    class CountedBias(dict[int, float]):
        reads = 0

        def __iter__(self) -> Iterator[int]:
            self.reads += 1
            return super().__iter__()

        def values(self) -> Any:
            self.reads += 1
            return super().values()

        def items(self) -> Any:
            self.reads += 1
            return super().items()

    bias = CountedBias({3: 5.0, 9: -100.0})
    params = SamplingParams(temperature=0.0, logit_bias=bias, min_tokens=5, stop_token_ids=(4,))
    state = make_state(params, [], [])
    reads = bias.reads
    assert reads > 0
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4] = 50.0
    for _ in range(4):
        assert Sampler(VOCAB_SIZE).choose(logits.clone(), [state]).token_ids == [3]
        state.add(3)
    assert bias.reads == reads
