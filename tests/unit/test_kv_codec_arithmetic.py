"""The compiled arithmetic is the reference's, bit for bit: codes, and what is decoded from them."""

from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.compiled import compiled
from kv_transfer.codecs import quantised, reference, rotary
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.planes import digits_per_byte
from kv_transfer.codecs.rotation import parts, signs
from kv_transfer.codecs.spec import Axis, PipelineSpec, Quantiser
from tests.kv_codec_frames import code, place_of, quantised_specs, random_kv

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (1, 2, 7, 8, 40, 64, 80, 96, 128)


@settings(max_examples=150, deadline=None)
@given(
    spec=quantised_specs(),
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 150),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    first_token=st.sampled_from((0, 3, 600)),
)
def test_compiled_equals_reference(
    spec: PipelineSpec,
    seed: int,
    layers: int,
    heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    first_token: int,
) -> None:
    kv = random_kv(seed, layers, heads, tokens, head_dim, dtype)
    place = place_of(kv, first_token=first_token, first_layer=1)
    fast = code(spec, kv, place)
    decoded = fast.decode()
    with patch.object(quantised, "_arithmetic", lambda *_: reference):
        slow = code(spec, kv, place)
        expected = slow.decode()
    assert fast.params == slow.params
    assert all(torch.equal(a, b) for a, b in zip(fast.sections, slow.sections, strict=True))
    assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_transform_is_an_orthogonal_matrix(head_dim: int) -> None:
    matrix = reference._hadamard(torch.eye(head_dim)[None])[0]
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim), atol=1e-5)
    assert torch.equal(matrix, matrix.T)
    sizes = parts(head_dim)
    assert sum(sizes) == head_dim
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)


def test_signs_depend_on_seed_layer_and_head_by_global_numbers() -> None:
    both = signs(7, 0, 4, 0, 2, 64)
    assert set(np.unique(both)) == {-1.0, 1.0}
    assert len({row.tobytes() for row in both}) == 8
    assert np.array_equal(signs(7, 2, 2, 1, 1, 64), both.reshape(4, 2, 64)[2:, 1])
    assert not np.array_equal(signs(8, 0, 4, 0, 2, 64), both)
    assert 0.4 < (both > 0).mean() < 0.6
    assert both[0, :8].tolist() == signs(7, 0, 1, 0, 1, 8)[0].tolist()


@pytest.mark.parametrize(
    ("levels", "digits"), [(2, 8), (3, 5), (4, 4), (5, 3), (6, 3), (7, 2), (16, 2), (17, 1), (256, 1)]
)
def test_as_many_digits_as_fit(levels: int, digits: int) -> None:
    assert digits_per_byte(levels) == digits
    assert levels**digits <= 256 < levels ** (digits + 1)


@pytest.mark.parametrize("name", [name for name in ladder() if name != "none"])
@pytest.mark.parametrize("arithmetic", ["compiled", "reference"])
def test_the_largest_float16_stays_finite(name: str, arithmetic: str) -> None:
    kv = random_kv(1, 2, 2, 48, 80, torch.float16)
    kv[0, :, 0, 5, 3], kv[1, 1, 1, 7, 0], kv[0, 1, 1, 20, 1] = 65504.0, -65504.0, 60000.0
    with ExitStack() as stack:
        if arithmetic == "reference":
            stack.enter_context(patch.object(quantised, "_arithmetic", lambda *_: reference))
        decoded = code(ladder(1e4)[name], kv).decode()
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("axis", ["token", "group", "channel", "tensor"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 2, 80), (1, 2, 2, 70, 3)], ids=str)
def test_zeros_of_either_sign_are_coded_alike(axis: Axis, shape: tuple[int, ...]) -> None:
    levels = Quantiser(levels=2, axis=axis, symmetric=False)
    spec = PipelineSpec(center_k=False, k=levels, v=levels, entropy="none")
    signs_of_zero = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).bool()
    kv = torch.where(signs_of_zero, -0.0, 0.0).bfloat16()
    fast = code(spec, kv)
    with patch.object(quantised, "_arithmetic", lambda *_: reference):
        slow = code(spec, kv)
    assert fast.params == slow.params
    assert all(torch.equal(a, b) for a, b in zip(fast.sections, slow.sections, strict=True))
    assert not fast.decode().any()


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])  # as on a read-only image

    @compiled
    def twice(number: int) -> int:
        return 2 * number

    assert twice(21) == 42


def test_the_tables_of_a_long_prompt_are_computed_once() -> None:
    rotary._table.cache_clear()
    for _ in range(3):  # every layer asks again
        for first in range(0, 131_072, 2048):
            rotary.rope_tables(1e4, 2, first, 2048)
    assert rotary._table.cache_info().misses == 131_072 // 512
    rotary._table.cache_clear()
