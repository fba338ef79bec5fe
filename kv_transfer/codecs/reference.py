"""The arithmetic of the quantised codec, slow and plain. the compiled and every GPU kernel equal it bit for bit.

Everything is float32, round to nearest even, one operation at a time: no fused multiply-add, no reordering. ``f32(e)``
is a constant computed in double and rounded once. Per plane ``x[T, D]``, values exact from bfloat16, float16, float32:

0. Rotary embedding (when undone), tables of `rotary`: ``u, w = x[d], x[d + D/2]``; ``u * cos + w * sin``,
   ``w * cos - u * sin``.
1. Mean (centred halves). ``s[d]`` = sum over blocks of 32 successive tokens, in order, of the sum of the block's
   tokens, in order, both from 0.0; ``m = s * f32(1 / T)``; ``a = max |m|``; ``step`` = ``a / 127`` rounded up to
   bfloat16 (``bits + 0xFFFF >> 16``); ``code = rint(clamp(m * (1 / step), -127, 127))``; ``m' = code * step``;
   ``z = x - m'``. A step below the smallest normal counts as zero: all codes 0.
2. Rotation. ``y[d] = z[d] * sign[d]``; then for each part of n channels butterflies ``(u, w) -> (u + w, u - w)`` over
   pairs at distance n/2, n/4, ... 1; then ``* f32(1 / sqrt(n))``.
3. Step, per scale of a segment. Symmetric: ``raw = max |y| * f32(2 * clip / (levels - 1))``. With step_rms: ``ss[d]`` =
   sum of ``z * z`` in the order of 1; ``r`` = sum of ``ss`` over d, in order; ``raw = sqrt(r * f32(1 / (T * D))) *
   f32(step_rms)``. Asymmetric: ``low`` = ``min y`` rounded down to bfloat16, never -0; ``raw = |max y - low| *
   f32(1 / (levels - 1))``.
   ``word = (bits(raw) + 0x7FFFF) >> 19`` (rounded up to 4 bits of mantissa); ``base = max(0, largest word of the
   plane's segment - 255)``; ``scale = max(0, word - base)``; the step used is ``float((base + scale) << 19)``.
4. Level. ``inv = 1 / step`` (0 when the step is below the smallest normal). Symmetric:
   ``q = rint(clamp(y * inv + (levels - 1) / 2, 0, levels - 1))``; asymmetric: ``q = rint(clamp((y - low) * inv, 0,
   levels - 1))``. Packed as `planes.HalfCodes` says.
5. Back. ``y = (q - (levels - 1) / 2) * step``, or ``q * step + low``; the butterflies of 2, ``* f32(1 / sqrt(n))``,
   ``* sign``; ``x = y + m'``; the embedding again: ``u * cos - w * sin``, ``w * cos + u * sin``; rounded to the dtype,
   where float16 saturates.

An input that is not finite, or has a step, mean or least value from 2 ** 96 on, is not coded.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codecs.planes import (
    F32,
    I8,
    U8,
    U16,
    HalfCodes,
    HalfPlan,
    Segment,
    SegmentRule,
    digits_per_byte,
    split,
)
from kv_transfer.codecs.rotation import parts

LAST_WORD = 3568  # steps from 2 ** 96 on are not coded: nothing that is decoded can overflow
LAST_BFLOAT16 = 0x6F80  # the same for means and least values
_BLOCK = 32
_TINY = 2.0**-126
_LARGEST_FLOAT16 = 65504.0


def encode(kv: Tensor, plan: HalfPlan) -> HalfCodes | None:
    """Code one half of ``kv[L * 2 * K, T, D]``; None when it cannot be coded. Pure."""
    x = kv[torch.from_numpy(plan.planes_at), plan.start : plan.stop].float()
    if not bool(torch.isfinite(x).all()):
        return None
    if plan.rope is not None:
        x = _undo_rope(x, *plan.rope)
    mean_steps, mean_codes, means = _means(x, plan.is_centred)
    if (mean_steps >= LAST_BFLOAT16).any():
        return None
    z = x - means[:, None, :]
    y = z if plan.signs is None else _hadamard(z * torch.from_numpy(plan.signs.copy())[:, None, :])
    codes = HalfCodes(
        mean_steps=mean_steps,
        mean_codes=mean_codes,
        bases=np.zeros((len(plan.segments), plan.num_planes), dtype=np.uint16),
        scales=np.zeros(plan.num_scales, dtype=np.uint8),
        mins=np.zeros(plan.num_mins, dtype=np.uint16),
        symbols=np.zeros(plan.num_symbols, dtype=np.uint8),
    )
    for idx, segment in enumerate(plan.segments):
        tokens = slice(segment.start - plan.start, segment.stop - plan.start)
        for plane in range(plan.num_planes):
            base = _encode_plane(y[plane, tokens], z[plane, tokens], codes, segment, plane)
            if base is None:
                return None
            codes.bases[idx, plane] = base
    return codes


def decode(codes: HalfCodes, plan: HalfPlan, kv: Tensor) -> bool:
    """Write one half into ``kv[L * 2 * K, T, D]``; False when a digit is not a level."""
    parts_of_y = []
    for idx, segment in enumerate(plan.segments):
        for plane in range(plan.num_planes):
            part = _decode_plane(codes, segment, plane, int(codes.bases[idx, plane]), plan.head_dim)
            if part is None:
                return False
            parts_of_y.append(part)
    planes = plan.num_planes
    y = torch.cat([torch.stack(parts_of_y[i : i + planes]) for i in range(0, len(parts_of_y), planes)], dim=1)
    if plan.signs is not None:
        y = _hadamard(y) * torch.from_numpy(plan.signs.copy())[:, None, :]
    step = _from_bfloat16(torch.from_numpy(codes.mean_steps.astype(np.int32)))
    x = y + (torch.from_numpy(codes.mean_codes.copy()).float() * step[:, None])[:, None, :]
    if plan.rope is not None:
        x = _redo_rope(x, *plan.rope)
    kv[torch.from_numpy(plan.planes_at), plan.start : plan.stop] = narrowed(x, kv.dtype)
    return True


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 in a dtype of KV. Levels reach past the largest magnitude; float16 has no room for that. Pure."""
    return x.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).to(dtype) if dtype == torch.float16 else x.to(dtype)


def _encode_plane(y: Tensor, z: Tensor, codes: HalfCodes, segment: Segment, plane: int) -> int | None:
    """Fill in scales, least values and symbols of a plane ``[T, D]``, and return its base."""
    rule, levels, factor = segment.rule, int(segment.levels[plane]), float(segment.factors[plane])
    scales_out, mins_out, symbols_out = split(codes, segment, plane, y.shape[1])
    groups = _grouped(y, rule)
    low = torch.zeros(groups.shape[0])
    if rule.has_step_rms:
        raw = _rms(z).reshape(1) * factor
    elif rule.is_symmetric:
        raw = groups.abs().amax(-1) * factor
    else:
        low_bits = _bfloat16_down(groups.amin(-1))
        if bool(((low_bits & 0x7FFF) >= LAST_BFLOAT16).any()):
            return None
        low = _from_bfloat16(low_bits)
        raw = (groups.amax(-1) - low).abs() * factor  # of two zeros it may be -0
        mins_out[:] = low_bits.numpy().astype(np.uint16)
    if not bool(torch.isfinite(raw).all()):
        return None
    words = (raw.view(torch.int32) + 0x7FFFF) >> 19
    base = max(0, int(words.max()) - 255)
    scales = (words - base).clamp(min=0)
    if base + int(scales.max()) >= LAST_WORD:
        return None
    scales_out[:] = scales.numpy().astype(np.uint8)
    steps = ((scales + base) << 19).view(torch.float32)
    inverse = torch.where(steps < _TINY, torch.zeros_like(steps), 1.0 / steps)
    inverse = _spread(inverse, rule, *y.shape)
    if rule.is_symmetric:
        level = y * inverse + (levels - 1) / 2
    else:
        level = (y - _spread(low, rule, *y.shape)) * inverse
    symbols_out[:] = _pack(level.clamp(0, levels - 1).round().to(torch.int64), levels)
    return base


def _decode_plane(codes: HalfCodes, segment: Segment, plane: int, base: int, head_dim: int) -> Tensor | None:
    rule, levels = segment.rule, int(segment.levels[plane])
    scales, mins, symbols = split(codes, segment, plane, head_dim)
    q = _unpack(symbols, levels, segment.num_tokens, head_dim)
    if q is None:
        return None
    shape = (segment.num_tokens, head_dim)
    steps = _spread(((torch.from_numpy(scales.astype(np.int32)) + base) << 19).view(torch.float32), rule, *shape)
    if rule.is_symmetric:
        return (q.float() - (levels - 1) / 2) * steps
    low = _spread(_from_bfloat16(torch.from_numpy(mins.astype(np.int32))), rule, *shape)
    return q.float() * steps + low


def _undo_rope(x: Tensor, cos: F32, sin: F32) -> Tensor:
    u, w = x.chunk(2, dim=-1)
    c, s = torch.from_numpy(cos.copy()), torch.from_numpy(sin.copy())
    return torch.cat((u * c + w * s, w * c - u * s), dim=-1)


def _redo_rope(x: Tensor, cos: F32, sin: F32) -> Tensor:
    u, w = x.chunk(2, dim=-1)
    c, s = torch.from_numpy(cos.copy()), torch.from_numpy(sin.copy())
    return torch.cat((u * c - w * s, w * c + u * s), dim=-1)


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
    step_bits = ((mean.abs().amax(-1) / 127.0).view(torch.int32) + 0xFFFF) >> 16
    step = _from_bfloat16(step_bits)
    inverse = torch.where(step < _TINY, torch.zeros_like(step), 1.0 / step)
    codes = (mean * inverse[:, None]).clamp(-127, 127).round()
    return step_bits.numpy().astype(np.uint16), codes.to(torch.int8).numpy(), codes * step[:, None]


def _rms(z: Tensor) -> Tensor:
    squares = _sum_tokens((z * z)[None])[0]
    total = torch.zeros(())
    for channel in range(z.shape[1]):
        total = total + squares[channel]
    return (total * _f32(1.0 / z.numel())).sqrt()


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


def _grouped(y: Tensor, rule: SegmentRule) -> Tensor:
    """Return ``[S, values that share the scale]`` of ``[T, D]``; a short last group repeats its last token."""
    num_tokens, head_dim = y.shape
    if rule.axis == "token":
        return y
    if rule.axis == "tensor":
        return y.reshape(1, -1)
    if rule.axis == "channel":
        return y.transpose(0, 1)
    y = torch.cat([y, y[-1:].expand(-num_tokens % rule.group_tokens, -1)])
    return y.reshape(-1, rule.group_tokens, head_dim).transpose(1, 2).flatten(0, 1)


def _spread(scales: Tensor, rule: SegmentRule, num_tokens: int, head_dim: int) -> Tensor:
    """Turn ``[S]`` into what goes with ``[T, D]``."""
    if rule.axis == "group":
        # Never more than the plane's own size: a frame may state groups of any length.
        return scales.reshape(-1, head_dim)[torch.arange(num_tokens) // rule.group_tokens]
    return scales[:, None] if rule.axis == "token" else scales[None, :]


def _bfloat16_down(value: Tensor) -> Tensor:
    """Return bits (int32) of the largest bfloat16 that is not above `value`."""
    bits = torch.where(value == 0, 0, value.view(torch.int32))  # which of two zeros is the least, machines differ in
    down = (bits >> 16) + ((bits < 0) & (bits & 0xFFFF != 0)).to(torch.int32)
    return down & 0xFFFF


def _from_bfloat16(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32)


def _pack(q: Tensor, levels: int) -> U8:
    num_tokens, head_dim = q.shape
    digits = digits_per_byte(levels)
    q = torch.cat([q, q.new_zeros(num_tokens, -head_dim % digits)], dim=1).reshape(num_tokens, digits, -1)
    place = levels ** torch.arange(digits)
    return (q * place[:, None]).sum(1).reshape(-1).numpy().astype(np.uint8)


def _unpack(symbols: U8, levels: int, num_tokens: int, head_dim: int) -> Tensor | None:
    digits = digits_per_byte(levels)
    packed = torch.from_numpy(symbols.astype(np.int64))
    if int(packed.max()) >= levels**digits:
        return None
    place = levels ** torch.arange(digits)
    return (packed.reshape(num_tokens, 1, -1) // place[:, None] % levels).flatten(1)[:, :head_dim]
