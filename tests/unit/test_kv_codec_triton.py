"""The Triton arithmetic, run by Triton's interpreter: codes and values equal those of the reference, bit for bit.

Without Triton there is nothing to run; with a CUDA device `tests/gpu` runs the compiled kernels. Whether Triton
interprets is settled when it is imported, and PyTorch may have imported it before: the cases run in a process of their
own, which `test_all_in_a_process_that_interprets` starts.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch

from kv_transfer.box import Box
from kv_transfer.codec import FramePlace
from kv_transfer.codecs import quantised, reference
from kv_transfer.codecs.frame_plan import HALVES, FrameShape, classes_of, plan_half
from kv_transfer.codecs.planes import HalfPlan
from kv_transfer.codecs.quantised import QuantisedEncoder
from kv_transfer.codecs.spec import PipelineSpec, Quantiser

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
is_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not is_interpreting, reason="run with TRITON_INTERPRET=1")

SPECS = {
    "tokens": PipelineSpec(k=Quantiser(levels=8), v=Quantiser(levels=6), rotate_v=True),
    "groups, least values": PipelineSpec(
        k=Quantiser(levels=7, axis="group", group_tokens=5, symmetric=False),
        v=Quantiser(levels=3, axis="channel"),
        center_v=True,
    ),
    "classes": PipelineSpec(
        k=Quantiser(levels=12, axis="tensor", step_rms=0.5),
        v=Quantiser(levels=256, axis="tensor", symmetric=False),
        protected_first=1,
        k_protected_levels=32,
        v_protected_levels=2,
        low_heads=((1, 1),),
        k_low_levels=2,
        v_low_levels=5,
        sink_tokens=3,
        tail_tokens=2,
    ),
    "rope": PipelineSpec(k=Quantiser(levels=5, clip=0.9), v=Quantiser(levels=4), rope_theta=10000.0),
}
SHAPES = ((2, 2, 37, 16), (1, 2, 66, 64))  # layers, heads, tokens, head_dim


@pytest.fixture(scope="module")
def arithmetic() -> ModuleType:
    return importlib.import_module("kv_transfer.codecs.triton_quantise")


@pytest.mark.slow
@pytest.mark.skipif(is_interpreting, reason="this is that process")
def test_all_in_a_process_that_interprets() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def plans(spec: PipelineSpec, shape: tuple[int, int, int, int]) -> list[HalfPlan]:
    """Return the plans of both halves of a frame of that shape."""
    layers, heads, tokens, head_dim = shape
    encoder = QuantisedEncoder(spec)
    place = FramePlace(Box(range(layers), range(heads), range(tokens)), tokens, layers, heads)
    extents = FrameShape.of((layers, 2, heads, tokens, head_dim))
    params = encoder._params(place, extents)
    classes = classes_of(params, extents, encoder._low_map(place))
    return [plan_half(params, extents, half, classes, encoder._factors_of(half, place))[0] for half in HALVES]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(SPECS))
def test_codes_and_values_equal_the_reference(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, arithmetic: ModuleType
) -> None:
    layers, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(7)
    kv = torch.randn(layers * 2 * heads, tokens, head_dim, generator=generator).to(dtype)
    kv[:, :, 3] += 20  # a channel with a bias, as keys have
    for plan in plans(SPECS[name], shape):
        expected, found = reference.encode(kv, plan), arithmetic.encode(kv, plan)
        assert expected is not None
        assert found is not None
        for entry in dataclasses.fields(expected):
            np.testing.assert_array_equal(getattr(found, entry.name), getattr(expected, entry.name), entry.name)
        wanted, got = torch.zeros_like(kv), torch.zeros_like(kv)
        assert reference.decode(expected, plan, wanted)
        assert arithmetic.decode(expected, plan, got)
        assert torch.equal(got, wanted)


@interpreted
def test_what_cannot_be_coded_is_told_apart(arithmetic: ModuleType) -> None:
    plan = plans(SPECS["tokens"], SHAPES[0])[0]
    kv = torch.randn(8, 37, 16)
    kv[0, 0, 0] = float("inf")
    assert arithmetic.encode(kv, plan) is None
    codes = arithmetic.encode(torch.randn(8, 37, 16), plan)
    codes.symbols[0] = 255  # two digits of eight levels stay below 64
    assert not arithmetic.decode(codes, plan, torch.zeros(8, 37, 16))


@interpreted
def test_tensors_of_the_host_go_another_way(arithmetic: ModuleType) -> None:
    assert not arithmetic.can_code(torch.zeros(1, 2, 1, 1, 64))
    assert not arithmetic.can_code_on(torch.device("cuda"), 80)  # split in 64 + 16: on the host
    assert arithmetic.can_code_on(torch.device("cuda"), 128)
    assert quantised._arithmetic_for(torch.zeros(1)) is not arithmetic
