"""The quantised codec's arithmetic on a CUDA device: the same codes as `reference`, bit for bit.

KV is read and written where it lies, on the device; what crosses to the host is the coded half, a tenth of it, which
the entropy stage squeezes there. Sums, the transform and the digits are Triton kernels; what is exact in any order or
small (largest values, steps, means) is torch on the device. Triton is optional, and so is a head_dim that is no power
of two: `can_code` says whether this path takes a tensor; whoever is told no copies it to the host.
"""

import logging
import math
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codecs.planes import HalfCodes, HalfPlan, Segment, digits_per_byte, plane_scales, plane_symbols
from kv_transfer.codecs.reference import LAST_BFLOAT16, LAST_WORD, narrowed

_log = logging.getLogger(__name__)
_BLOCK = 32
_TINY = 2.0**-126
_TILE = 16  # tokens of one program
_AXES = ("token", "group", "channel", "tensor")


@cache
def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    _log.info("triton is not installed: KV on CUDA devices is coded on the host")
    return False


def can_code(kv: Tensor) -> bool:
    """Tell whether tensors like this one are coded here."""
    return can_code_on(kv.device, kv.shape[-1])


def can_code_on(device: torch.device, head_dim: int) -> bool:
    """Tell whether KV on a device is coded here."""
    return device.type == "cuda" and head_dim >= 2 and head_dim & (head_dim - 1) == 0 and _has_triton()


def encode(kv: Tensor, plan: HalfPlan) -> HalfCodes | None:
    """As `reference.encode`; `kv` on the device, the codes on the host."""
    device, planes = kv.device, plan.num_planes
    x = kv[_on(plan.planes_at, device), plan.start : plan.stop].float().contiguous()
    if not bool(torch.isfinite(x).all()):
        return None
    if plan.rope is not None:
        x = _turn(x, plan.rope, is_back=False)
    mean_bits = torch.zeros(planes, dtype=torch.int32, device=device)
    mean_codes = torch.zeros(planes, plan.head_dim, device=device)
    if plan.is_centred:
        mean_bits, mean_codes = _means(x)
        x = x - (mean_codes * _from_bfloat16(mean_bits)[:, None])[:, None, :]
        if bool((mean_bits >= LAST_BFLOAT16).any()):
            return None
    y = x
    if plan.signs is not None:
        y = x.clone()
        _rotate(y, plan, is_inverse=False)
    bases = torch.zeros(len(plan.segments), planes, dtype=torch.int32, device=device)
    scales = np.zeros(plan.num_scales, dtype=np.uint8)
    mins = np.zeros(plan.num_mins, dtype=np.uint16)
    symbols = torch.zeros(plan.num_symbols, dtype=torch.uint8, device=device)
    for idx, segment in enumerate(plan.segments):
        span = range(segment.start - plan.start, segment.stop - plan.start)
        found = _steps(y[:, span.start : span.stop], x[:, span.start : span.stop], segment)
        if found is None:
            return None
        words, lows, low_bits = found
        base = (words.amax(-1) - 255).clamp(min=0)
        scale = (words - base[:, None]).clamp(min=0)
        if bool((base + scale.amax(-1) >= LAST_WORD).any()):
            return None
        bases[idx] = base
        _quantise(y, span, _step_of(scale, base), lows, segment, symbols)
        at = segment.scales_at[:, None] + np.arange(scale.shape[1])
        scales[at] = scale.cpu().numpy().astype(np.uint8)
        if low_bits is not None:
            mins[at] = low_bits.cpu().numpy().astype(np.uint16)
    return HalfCodes(
        mean_steps=mean_bits.cpu().numpy().astype(np.uint16),
        mean_codes=mean_codes.to(torch.int8).cpu().numpy(),
        bases=bases.cpu().numpy().astype(np.uint16),
        scales=scales,
        mins=mins,
        symbols=symbols.cpu().numpy(),
    )


def decode(codes: HalfCodes, plan: HalfPlan, kv: Tensor) -> bool:
    """As `reference.decode`; `kv` on the device."""
    device, planes, head_dim = kv.device, plan.num_planes, plan.head_dim
    if not _are_levels(codes, plan):
        return False
    y = torch.empty(planes, plan.stop - plan.start, head_dim, device=device)
    symbols = torch.from_numpy(np.ascontiguousarray(codes.symbols)).to(device)
    for idx, segment in enumerate(plan.segments):
        span = range(segment.start - plan.start, segment.stop - plan.start)
        at = segment.scales_at[:, None] + np.arange(plane_scales(segment.rule, segment.num_tokens, head_dim))
        scale = torch.from_numpy(codes.scales[at].astype(np.int32)).to(device)
        base = torch.from_numpy(codes.bases[idx].astype(np.int32)).to(device)
        steps = _step_of(scale, base).contiguous()
        lows = steps
        if not segment.rule.is_symmetric:
            lows = _from_bfloat16(torch.from_numpy(codes.mins[at].astype(np.int32)).to(device)).contiguous()
        _dequantise(symbols, steps, lows, segment, y, span)
    if plan.signs is not None:
        _rotate(y, plan, is_inverse=True)
    step = _from_bfloat16(torch.from_numpy(codes.mean_steps.astype(np.int32)).to(device))
    mean = torch.from_numpy(codes.mean_codes.copy()).to(device).float() * step[:, None]
    x = y + mean[:, None, :]
    if plan.rope is not None:
        x = _turn(x, plan.rope, is_back=True)
    kv[_on(plan.planes_at, device), plan.start : plan.stop] = narrowed(x, kv.dtype)
    return True


def _means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of channels, coded: bits of their steps [P], and counts of steps [P, D]."""
    mean = _sum_tokens(x, is_squared=False) * _f32(1.0 / x.shape[1])
    bits = ((mean.abs().amax(-1) / 127.0).view(torch.int32) + 0xFFFF) >> 16
    return bits, (mean * _inverse(_from_bfloat16(bits))[:, None]).clamp(-127, 127).round()


def _step_of(scale: Tensor, base: Tensor) -> Tensor:
    """Return the steps [P, S] that scales and the bases of their planes mean."""
    return ((scale + base[:, None]) << 19).view(torch.float32)


def _quantise(y: Tensor, span: range, steps: Tensor, lows: Tensor, segment: Segment, symbols: Tensor) -> None:
    """Write the packed digits of one segment, tokens `span` of `y`, into `symbols`."""
    from kv_transfer.codecs import triton_kernels as kernels

    planes, num_tokens, head_dim = y.shape
    levels, digits = _counts(segment, y.device)
    kernels.quantise[(planes, -(-len(span) // _TILE))](
        y,
        _inverse(steps).contiguous(),
        lows,
        levels,
        digits,
        _on(segment.symbols_at, y.device),
        symbols,
        num_tokens,
        span.start,
        span.stop,
        steps.shape[1],
        segment.rule.group_tokens,
        IS_SYMMETRIC=segment.rule.is_symmetric,
        AXIS=_AXES.index(segment.rule.axis),
        TOKENS=_TILE,
        D=head_dim,
        enable_fp_fusion=False,
    )


def _dequantise(symbols: Tensor, steps: Tensor, lows: Tensor, segment: Segment, y: Tensor, span: range) -> None:
    """Write what the packed digits of one segment mean to tokens `span` of `y`."""
    from kv_transfer.codecs import triton_kernels as kernels

    planes, num_tokens, head_dim = y.shape
    levels, digits = _counts(segment, y.device)
    kernels.dequantise[(planes, -(-len(span) // _TILE))](
        symbols,
        steps,
        lows,
        levels,
        digits,
        _on(segment.symbols_at, y.device),
        y,
        num_tokens,
        span.start,
        span.stop,
        steps.shape[1],
        segment.rule.group_tokens,
        IS_SYMMETRIC=segment.rule.is_symmetric,
        AXIS=_AXES.index(segment.rule.axis),
        TOKENS=_TILE,
        D=head_dim,
        enable_fp_fusion=False,
    )


def _steps(y: Tensor, z: Tensor, segment: Segment) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return ``[P, S]`` words of the steps, least values, and the bits of those; None when they cannot be coded."""
    rule = segment.rule
    factor = torch.from_numpy(segment.factors.copy()).to(y.device)[:, None]
    if rule.has_step_rms:
        squares = _sum_tokens(z.contiguous(), is_squared=True)
        total = _in_order(squares[:, :, None])[:, :1]
        raw, lows, low_bits = (total * _f32(1.0 / (z.shape[1] * z.shape[2]))).sqrt() * factor, y, None
    elif rule.is_symmetric:
        raw, lows, low_bits = _grouped(y.abs(), segment).amax(-1) * factor, y, None
    else:
        groups = _grouped(y, segment)
        low_bits = _bfloat16_down(groups.amin(-1))
        if bool(((low_bits & 0x7FFF) >= LAST_BFLOAT16).any()):
            return None
        lows = _from_bfloat16(low_bits).contiguous()
        raw = (groups.amax(-1) - lows).abs() * factor
    if not bool(torch.isfinite(raw).all()):
        return None
    return (raw.contiguous().view(torch.int32) + 0x7FFFF) >> 19, lows, low_bits


def _grouped(y: Tensor, segment: Segment) -> Tensor:
    """Return ``[P, S, values that share the scale]``; a short last group repeats its last token."""
    planes, tokens, head_dim = y.shape
    match segment.rule.axis:
        case "token":
            return y
        case "tensor":
            return y.reshape(planes, 1, -1)
        case "channel":
            return y.transpose(1, 2)
        case "group":
            size = min(segment.rule.group_tokens, tokens)
            y = torch.cat([y, y[:, -1:].expand(-1, -tokens % size, -1)], dim=1)
            return y.reshape(planes, -1, size, head_dim).transpose(2, 3).flatten(1, 2)


def _sum_tokens(x: Tensor, *, is_squared: bool) -> Tensor:
    from kv_transfer.codecs import triton_kernels as kernels

    planes, tokens, head_dim = x.shape
    blocks = -(-tokens // _BLOCK)
    sums = torch.empty(planes, blocks, head_dim, device=x.device)
    kernels.block_sums[(planes, blocks)](
        x, sums, tokens, blocks, SQUARES=is_squared, BLOCK=_BLOCK, D=head_dim, enable_fp_fusion=False
    )
    return _in_order(sums)


def _in_order(x: Tensor) -> Tensor:
    """Return the sum of ``[P, rows, width]`` over the rows, added one after the other."""
    from kv_transfer.codecs import triton_kernels as kernels

    planes, rows, width = x.shape
    total = torch.empty(planes, width, device=x.device)
    kernels.sums_in_order[(planes,)](x.contiguous(), total, rows, WIDTH=width)
    return total


def _rotate(y: Tensor, plan: HalfPlan, *, is_inverse: bool) -> None:
    from kv_transfer.codecs import triton_kernels as kernels

    assert plan.signs is not None
    planes, tokens, head_dim = y.shape
    signs = torch.from_numpy(plan.signs.copy()).to(y.device)
    kernels.rotate[(planes, -(-tokens // _TILE))](
        y,
        signs,
        _f32(1.0 / math.sqrt(head_dim)),
        tokens,
        IS_INVERSE=is_inverse,
        TOKENS=_TILE,
        D=head_dim,
        LOG_D=head_dim.bit_length() - 1,
        enable_fp_fusion=False,
    )


def _turn(x: Tensor, rope: tuple[np.ndarray, np.ndarray], *, is_back: bool) -> Tensor:
    """Undo the rotary embedding, or do it again. Torch never fuses the products with the sum."""
    cos, sin = (torch.from_numpy(table.copy()).to(x.device) for table in rope)
    u, w = x.chunk(2, dim=-1)
    if is_back:
        return torch.cat((u * cos - w * sin, w * cos + u * sin), dim=-1)
    return torch.cat((u * cos + w * sin, w * cos - u * sin), dim=-1)


def _are_levels(codes: HalfCodes, plan: HalfPlan) -> bool:
    """Tell whether every byte of digits is one that levels can make. On the host, where the bytes are."""
    for segment in plan.segments:
        for plane, count in enumerate(segment.levels):
            start = int(segment.symbols_at[plane])
            held = codes.symbols[start : start + plane_symbols(int(count), segment.num_tokens, plan.head_dim)]
            if int(held.max()) >= int(count) ** digits_per_byte(int(count)):
                return False
    return True


def _counts(segment: Segment, device: torch.device) -> tuple[Tensor, Tensor]:
    digits = np.array([digits_per_byte(int(count)) for count in segment.levels], dtype=np.int32)
    return _on(segment.levels.astype(np.int32), device), _on(digits, device)


def _inverse(steps: Tensor) -> Tensor:
    return torch.where(steps < _TINY, torch.zeros_like(steps), 1.0 / steps)


def _bfloat16_down(value: Tensor) -> Tensor:
    """Return bits (int32) of the largest bfloat16 that is not above `value`."""
    bits = torch.where(value == 0, 0, value.contiguous().view(torch.int32))
    return ((bits >> 16) + ((bits < 0) & (bits & 0xFFFF != 0)).to(torch.int32)) & 0xFFFF


def _from_bfloat16(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32)


def _f32(value: float) -> float:
    return float(np.float32(value))


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
