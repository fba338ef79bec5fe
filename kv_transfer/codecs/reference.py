"""The arithmetic of the quantised codec, slow and plain. `kernels` and every GPU kernel equal it bit for bit.

Everything is float32, round to nearest even, one operation at a time: no fused multiply-add, no reordering. ``f32(e)``
is a constant computed in double and rounded once. Per plane ``x[T, D]``, values exact from bfloat16, float16, float32:

1. Mean (centred planes). ``s[d]`` = sum over blocks of 32 successive tokens, in order, of the sum of the block's
   tokens, in order, both from 0.0; ``m = s * f32(1 / T)``; ``a = max |m|``; ``step`` = ``a / 127`` rounded up to
   bfloat16 (``bits + 0xFFFF >> 16``); ``code = rint(clamp(m * (1 / step), -127, 127))``; ``m' = code * step``;
   ``y = x - m'``. A step below the smallest normal counts as zero: all codes 0.
2. Rotation. ``y[d] *= sign[d]``; then for each part of n channels butterflies ``(u, w) -> (u + w, u - w)`` over
   pairs at distance n/2, n/4, ... 1; then ``* f32(1 / sqrt(n))``.
3. Step, per scale. Symmetric: ``a = max |y|``; ``raw = a * f32(2 * clip / (levels - 1))``. With step_rms: ``ss[d]`` =
   sum of ``z * z`` in the order of 1, where z is y before the rotation; ``r`` = sum of ``ss`` over d, in order;
   ``raw = sqrt(r * f32(1 / (T * D))) * f32(step_rms)``. Asymmetric: ``low`` = ``min y`` rounded down to bfloat16;
   ``raw = (max y - low) * f32(1 / (levels - 1))``.
   ``word = (bits(raw) + 0x7FFFF) >> 19`` (rounded up to 4 bits of mantissa); ``base = max(0, largest word of the
   plane - 255)``; ``scale = max(0, word - base)``; the step used is ``float((base + scale) << 19)``.
4. Level. ``inv = 1 / step`` (0 when the step is below the smallest normal). Symmetric:
   ``q = rint(clamp(y * inv + (levels - 1) / 2, 0, levels - 1))``; asymmetric: ``q = rint(clamp((y - low) * inv, 0,
   levels - 1))``.
5. Back. ``y = (q - (levels - 1) / 2) * step``, or ``q * step + low``; the butterflies of 2, ``* f32(1 / sqrt(n))``,
   ``* sign``; ``x = y + m'``; rounded to the dtype.

An input that is not finite, or whose steps are not, is not coded.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codecs.planes import F32, I8, U8, U16, CodedPlanes, PlaneRule
from kv_transfer.codecs.rotation import parts

_BLOCK = 32
_TINY = 2.0**-126


def encode_planes(x: Tensor, rule: PlaneRule, signs: F32) -> CodedPlanes | None:
    """Code planes ``[P, T, D]`` of any dtype; None when they cannot be coded. Pure."""
    y = x.float()
    if not bool(torch.isfinite(y).all()):
        return None
    num_planes, num_tokens, head_dim = y.shape
    mean_steps, mean_codes, means = _means(y, rule.is_centred)
    y = y - means[:, None, :]
    rms = _rms(y) if rule.step_rms is not None else None
    if rule.is_rotated:
        y = _hadamard(y * torch.from_numpy(signs.copy())[:, None, :])
    groups = _grouped(y, rule)
    if rule.is_symmetric:
        low = None
        if rms is not None:
            raw = (rms * _f32(rule.step_rms or 0.0)).reshape(num_planes, 1)
        else:
            raw = groups.abs().amax(-1) * _f32(2.0 * rule.clip / (rule.levels - 1))
    else:
        low_bits = _bfloat16_down(groups.amin(-1))
        low = _from_bfloat16(low_bits)
        raw = (groups.amax(-1) - low) * _f32(1.0 / (rule.levels - 1))
    if not bool(torch.isfinite(raw).all()):
        return None
    words = (raw.view(torch.int32) + 0x7FFFF) >> 19
    bases = (words.amax(-1) - 255).clamp(min=0)
    scales = (words - bases[:, None]).clamp(min=0)
    if bool(((bases[:, None] + scales) >= 0xFF0).any()):
        return None
    steps = _steps(scales, bases)
    inverse = torch.where(steps < _TINY, torch.zeros_like(steps), 1.0 / steps)
    inverse = _spread(inverse, rule, num_tokens, head_dim)
    if low is None:
        levels = y * inverse + (rule.levels - 1) / 2
        mins = np.zeros((num_planes, 0), dtype=np.uint16)
    else:
        levels = (y - _spread(low, rule, num_tokens, head_dim)) * inverse
        mins = low_bits.numpy().astype(np.uint16)
    q = levels.clamp(0, rule.levels - 1).round().to(torch.int64)
    return CodedPlanes(
        mean_steps,
        mean_codes,
        bases.numpy().astype(np.uint16),
        scales.numpy().astype(np.uint8),
        mins,
        _pack(q, rule),
    )


def decode_planes(
    coded: CodedPlanes, rule: PlaneRule, signs: F32, num_tokens: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the planes ``[P, T, D]``; None when a digit is not a level. Pure."""
    head_dim = signs.shape[1]
    q = _unpack(coded.symbols, rule, num_tokens, head_dim)
    if q is None:
        return None
    scales = torch.from_numpy(coded.scales.astype(np.int32))
    steps = _steps(scales, torch.from_numpy(coded.bases.astype(np.int32)))
    steps = _spread(steps, rule, num_tokens, head_dim)
    if rule.is_symmetric:
        y = (q.float() - (rule.levels - 1) / 2) * steps
    else:
        low = _from_bfloat16(torch.from_numpy(coded.mins.astype(np.int32)))
        y = q.float() * steps
        y = y + _spread(low, rule, num_tokens, head_dim)
    if rule.is_rotated:
        y = _hadamard(y) * torch.from_numpy(signs.copy())[:, None, :]
    step = _from_bfloat16(torch.from_numpy(coded.mean_steps.astype(np.int32)))
    means = torch.from_numpy(coded.mean_codes.copy()).float() * step[:, None]
    return (y + means[:, None, :]).to(dtype)


def _f32(value: float) -> float:
    return float(np.float32(value))


def _sum_tokens(y: Tensor) -> Tensor:
    total = torch.zeros_like(y[:, 0])
    for start in range(0, y.shape[1], _BLOCK):
        block = torch.zeros_like(total)
        for token in range(start, min(start + _BLOCK, y.shape[1])):
            block = block + y[:, token]
        total = total + block
    return total


def _means(y: Tensor, is_centred: bool) -> tuple[U16, I8, Tensor]:
    num_planes, num_tokens, head_dim = y.shape
    if not is_centred:
        steps = np.zeros(num_planes, dtype=np.uint16)
        return steps, np.zeros((num_planes, head_dim), dtype=np.int8), torch.zeros(num_planes, head_dim)
    mean = _sum_tokens(y) * _f32(1.0 / num_tokens)
    step_bits = (((mean.abs().amax(-1) / 127.0).view(torch.int32) + 0xFFFF) >> 16).clamp(max=0x7F7F)
    step = _from_bfloat16(step_bits)
    inverse = torch.where(step < _TINY, torch.zeros_like(step), 1.0 / step)
    codes = (mean * inverse[:, None]).clamp(-127, 127).round()
    return step_bits.numpy().astype(np.uint16), codes.to(torch.int8).numpy(), codes * step[:, None]


def _rms(y: Tensor) -> Tensor:
    squares = _sum_tokens(y * y)
    total = torch.zeros_like(squares[:, 0])
    for channel in range(y.shape[2]):
        total = total + squares[:, channel]
    return (total * _f32(1.0 / (y.shape[1] * y.shape[2]))).sqrt()


def _hadamard(y: Tensor) -> Tensor:
    done = []
    start = 0
    for size in parts(y.shape[-1]):
        part = y[..., start : start + size]
        start += size
        half = size // 2
        while half:
            pairs = part.reshape(*part.shape[:-1], size // (2 * half), 2, half)
            u, w = pairs[..., 0, :], pairs[..., 1, :]
            part = torch.stack((u + w, u - w), dim=-2).reshape(part.shape)
            half //= 2
        done.append(part * _f32(1.0 / math.sqrt(size)))
    return torch.cat(done, dim=-1)


def _grouped(y: Tensor, rule: PlaneRule) -> Tensor:
    """Return ``[P, S, values that share the scale]``; a short last group repeats its last token."""
    num_planes, num_tokens, head_dim = y.shape
    if rule.axis == "token":
        return y
    if rule.axis == "tensor":
        return y.reshape(num_planes, 1, -1)
    if rule.axis == "channel":
        return y.transpose(1, 2)
    pad = -num_tokens % rule.group_tokens
    y = torch.cat([y, y[:, -1:].expand(-1, pad, -1)], dim=1)
    return y.reshape(num_planes, -1, rule.group_tokens, head_dim).transpose(2, 3).flatten(1, 2)


def _spread(scales: Tensor, rule: PlaneRule, num_tokens: int, head_dim: int) -> Tensor:
    """Turn ``[P, S]`` into what multiplies ``[P, T, D]``."""
    if rule.axis == "token":
        return scales[:, :, None]
    if rule.axis == "tensor":
        return scales[:, :, None]
    if rule.axis == "channel":
        return scales[:, None, :]
    # Never more than the plane's own size: a frame may state groups of any length.
    return scales.reshape(scales.shape[0], -1, head_dim)[:, torch.arange(num_tokens) // rule.group_tokens]


def _bfloat16_down(value: Tensor) -> Tensor:
    """Return bits (int32) of the largest bfloat16 that is not above `value`."""
    bits = value.view(torch.int32)
    down = (bits >> 16) + ((bits < 0) & (bits & 0xFFFF != 0)).to(torch.int32)
    return down & 0xFFFF


def _from_bfloat16(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32)


def _steps(scales: Tensor, bases: Tensor) -> Tensor:
    return ((scales + bases[:, None]) << 19).view(torch.float32)


def _pack(q: Tensor, rule: PlaneRule) -> U8:
    num_planes, num_tokens, head_dim = q.shape
    pad = -num_tokens % rule.digits
    q = torch.cat([q, q.new_zeros(num_planes, pad, head_dim)], dim=1)
    q = q.reshape(num_planes, -1, rule.digits, head_dim)
    symbols = sum(q[:, :, digit] * rule.levels**digit for digit in range(rule.digits))
    assert isinstance(symbols, Tensor)
    if rule.order == "channel":
        symbols = symbols.transpose(1, 2)
    return symbols.reshape(num_planes, -1).numpy().astype(np.uint8)


def _unpack(symbols: U8, rule: PlaneRule, num_tokens: int, head_dim: int) -> Tensor | None:
    packed = torch.from_numpy(symbols.astype(np.int64))
    if packed.numel() and int(packed.max()) >= rule.levels**rule.digits:
        return None
    num_planes = packed.shape[0]
    if rule.order == "channel":
        packed = packed.reshape(num_planes, head_dim, -1).transpose(1, 2)
    else:
        packed = packed.reshape(num_planes, -1, head_dim)
    q = torch.stack([packed // rule.levels**digit % rule.levels for digit in range(rule.digits)], dim=2)
    return q.flatten(1, 2)[:, :num_tokens]
