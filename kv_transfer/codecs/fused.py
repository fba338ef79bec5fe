"""Plans for the compiled arithmetic: hands plain arrays over, and nothing that could be out of bounds.

Every extent comes from a `HalfPlan`, and the arrays are made here or have been checked against it; so the kernels,
which check nothing, stay inside.
"""

import math
import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kv_transfer.codecs.decode_kernel import decode_half
from kv_transfer.codecs.encode_kernel import encode_half
from kv_transfer.codecs.frame_plan import MAX_HEAD_DIM
from kv_transfer.codecs.planes import F32, I64, U8, HalfCodes, HalfPlan, digits_per_byte, plane_scales
from kv_transfer.codecs.reference import narrowed
from kv_transfer.codecs.rotation import parts

_AXES = ("token", "group", "channel", "tensor")
_DIGITS = np.array([0, 0, *(digits_per_byte(count) for count in range(2, 257))], dtype=np.int64)
_own = threading.local()
_NO_ROPE = np.zeros((0, 0), dtype=np.float32)
_NO_SIGNS = np.zeros((0, 0), dtype=np.float32)
_NO_SIGNS.setflags(write=False)  # as signs are: to numba that is another type, so another compilation


def encode(kv: Tensor, plan: HalfPlan) -> HalfCodes | None:
    """As `reference.encode`."""
    if plan.head_dim > MAX_HEAD_DIM:
        return None
    codes = HalfCodes(
        mean_steps=np.zeros(plan.num_planes, dtype=np.uint16),
        mean_codes=np.zeros((plan.num_planes, plan.head_dim), dtype=np.int8),
        bases=np.empty((len(plan.segments), plan.num_planes), dtype=np.uint16),
        scales=np.empty(plan.num_scales, dtype=np.uint8),
        mins=np.zeros(plan.num_mins, dtype=np.uint16),
        symbols=np.empty(plan.num_symbols, dtype=np.uint8),
    )
    _check(kv, plan, codes)
    factors = np.stack([segment.factors for segment in plan.segments])
    ints, levels, digits, symbols_at, scales_at, num_scales = _segments(plan)
    encode_all: Callable[..., bool] = encode_half  # numba's stubs do not follow `*`
    is_coded = encode_all(
        _bits(kv if kv.dtype == torch.bfloat16 else kv.float()),
        kv.dtype == torch.bfloat16,
        kv.shape[1] * plan.head_dim,
        plan.planes_at,
        plan.start,
        plan.stop,
        plan.is_centred,
        *_transforms(plan),
        ints,
        levels,
        digits,
        factors,
        symbols_at,
        scales_at,
        num_scales,
        *_arrays(codes),
        _working_memory(plan.stop - plan.start, plan.head_dim),
    )
    return codes if is_coded else None


def decode(codes: HalfCodes, plan: HalfPlan, kv: Tensor) -> bool:
    """As `reference.decode`."""
    _check(kv, plan, codes)
    wide = kv if kv.dtype != torch.float16 else torch.empty_like(kv, dtype=torch.float32)
    decode_all: Callable[..., bool] = decode_half
    is_decoded = decode_all(
        _bits(wide),
        kv.dtype == torch.bfloat16,
        kv.shape[1] * plan.head_dim,
        plan.planes_at,
        plan.start,
        *_transforms(plan),
        *_segments(plan),
        *_arrays(codes),
    )
    if wide is not kv:
        at = torch.from_numpy(plan.planes_at)
        kv[at, plan.start : plan.stop] = narrowed(wide[at, plan.start : plan.stop], kv.dtype)
    return is_decoded


def _working_memory(num_tokens: int, head_dim: int) -> F32:
    """Return the thread's own, kept because fresh pages cost as much as the arithmetic."""
    held: F32 | None = getattr(_own, "memory", None)
    if held is None or held.size < num_tokens * head_dim:
        held = _own.memory = np.empty(num_tokens * head_dim, dtype=np.float32)
    return held[: num_tokens * head_dim].reshape(num_tokens, head_dim)


def _check(kv: Tensor, plan: HalfPlan, codes: HalfCodes) -> None:
    """Our own invariants: what has come from outside was checked by the decoder."""
    num_planes, num_segments = plan.num_planes, len(plan.segments)
    assert kv.is_contiguous()
    assert kv.shape[2] == plan.head_dim
    assert 0 <= plan.start < plan.stop <= kv.shape[1]
    assert plan.segments
    assert plan.planes_at.min() >= 0
    assert plan.planes_at.max() < kv.shape[0]
    assert codes.mean_steps.shape == (num_planes,)
    assert codes.mean_codes.shape == (num_planes, plan.head_dim)
    assert codes.bases.shape == (num_segments, num_planes)
    assert codes.scales.shape == (plan.num_scales,)
    assert codes.mins.shape == (plan.num_mins,)
    assert codes.symbols.shape == (plan.num_symbols,)


def _bits(kv: Tensor) -> npt.NDArray[np.generic]:
    held: U8 = kv.reshape(-1).view(torch.uint8).numpy()
    return held.view(np.uint16 if kv.dtype == torch.bfloat16 else np.uint32)


def _transforms(plan: HalfPlan) -> tuple[bool, F32, I64, F32, bool, F32, F32]:
    cos, sin = plan.rope or (_NO_ROPE, _NO_ROPE)
    signs = _NO_SIGNS if plan.signs is None else plan.signs
    return plan.signs is not None, signs, *_parts(plan.head_dim), plan.rope is not None, cos, sin


@lru_cache(maxsize=16)
def _parts(head_dim: int) -> tuple[I64, F32]:
    sizes = parts(head_dim)
    return np.array(sizes, dtype=np.int64), np.array([1.0 / math.sqrt(size) for size in sizes], dtype=np.float32)


def _segments(plan: HalfPlan) -> tuple[I64, I64, I64, I64, I64, I64]:
    ints = [
        (
            segment.start,
            segment.stop,
            _AXES.index(segment.rule.axis),
            segment.rule.group_tokens,
            segment.rule.is_symmetric,
            segment.rule.has_step_rms,
        )
        for segment in plan.segments
    ]
    levels = np.stack([segment.levels for segment in plan.segments])
    scales = [plane_scales(segment.rule, segment.num_tokens, plan.head_dim) for segment in plan.segments]
    return (
        np.array(ints, dtype=np.int64),
        levels,
        _DIGITS[levels],
        np.stack([segment.symbols_at for segment in plan.segments]),
        np.stack([segment.scales_at for segment in plan.segments]),
        np.array(scales, dtype=np.int64),
    )


def _arrays(codes: HalfCodes) -> tuple[npt.NDArray[np.generic], ...]:
    return codes.mean_steps, codes.mean_codes, codes.bases, codes.scales, codes.mins, codes.symbols
