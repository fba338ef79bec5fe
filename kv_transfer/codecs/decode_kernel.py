"""The decoding arithmetic of `reference` in numba; see `encode_kernel` for how such code is written."""

# mypy: disable-error-code="return-value"

from typing import Any

import numpy as np

from core.compiled import compiled
from kv_transfer.codecs.encode_kernel import TENSOR, TOKEN, rotate, scale_at

_TILE = 64  # tokens at most that are worked on at once
_HALF = np.float32(0.5)
_F1 = np.float32(1)


@compiled
def _is_valid(symbols: Any, limit: int) -> bool:
    top = np.uint8(0)
    for i in range(symbols.shape[0]):
        top = max(top, symbols[i])
    return np.int64(top) < limit


@compiled
def _unpack(packed: Any, digits: int, levels: int, rest: Any, out: Any) -> None:
    """Split bytes into digits: ``out[j]`` gets digit j of each."""
    count = packed.shape[0]
    if digits == 1:
        only = out[0]
        for i in range(count):
            only[i] = np.float32(packed[i])
        return
    for i in range(count):
        rest[i] = np.float32(packed[i])
    base = np.float32(levels)
    inverse = _F1 / base
    for j in range(digits):
        digit = out[j]
        for i in range(count):
            above = np.float32(np.int32((rest[i] + _HALF) * inverse))
            digit[i] = rest[i] - above * base
            rest[i] = above


@compiled
def _spread(found: Any, digits: int, count: int, y: Any) -> None:
    """Put digits where their channels are."""
    width = y.shape[1]
    each = -(-width // digits)
    for j in range(digits):
        start, levels = j * each, found[j]
        length = min(each, width - start)
        for t in range(count):
            out, level = y[t, start : start + length], levels[t * each : t * each + length]
            for i in range(length):
                out[i] = level[i]


@compiled
def _scale(y: Any, first: int, count: int, axis: int, centre: Any, steps: Any) -> None:
    """Turn symmetric levels of one scale per token or for all into values."""
    for t in range(count):
        row = y[t]
        step = steps[first + t if axis == TOKEN else 0]
        for d in range(row.shape[0]):
            row[d] = (row[d] - centre) * step


@compiled
def _scale_any(y: Any, first: int, count: int, axis: int, group: int, centre: Any, steps: Any, lows: Any) -> None:
    width = y.shape[1]
    for t in range(count):
        for d in range(width):
            at = scale_at(axis, group, width, first + t, d)
            if lows.shape[0]:
                value = y[t, d] * steps[at]
                y[t, d] = value + lows[at]
            else:
                y[t, d] = (y[t, d] - centre) * steps[at]


@compiled
def _add(y: Any, count: int, sign: Any, mean: Any) -> None:
    for t in range(count):
        row = y[t]
        for d in range(row.shape[0]):
            value = row[d] * sign[d]
            row[d] = value + mean[d]


@compiled
def _redo_rope(y: Any, count: int, cos: Any, sin: Any, first: int, out: Any) -> None:
    half = cos.shape[1]
    for t in range(count):
        u, w, c, s = y[t, :half], y[t, half:], cos[first + t], sin[first + t]
        a, b = out[t, :half], out[t, half:]
        for i in range(half):
            a[i] = u[i] * c[i] - w[i] * s[i]
        for i in range(half):
            b[i] = w[i] * c[i] + u[i] * s[i]


@compiled
def _narrow(word: Any, count: int, is_bfloat16: bool, bits: Any, at: int) -> None:
    out = bits[at : at + count]
    if is_bfloat16:
        for i in range(count):
            w = np.int32(word[i])
            out[i] = np.uint16((w + np.int32(0x7FFF) + ((w >> np.int32(16)) & np.int32(1))) >> np.int32(16))
    else:
        for i in range(count):
            out[i] = word[i]


@compiled
def decode_half(
    bits: Any, is_bfloat16: bool, plane_values: int, planes_at: Any, start: int,
    is_rotated: bool, signs: Any, sizes: Any, part_scales: Any, has_rope: bool, cos: Any, sin: Any,
    segment_ints: Any, levels: Any, digits: Any, symbols_at: Any, scales_at: Any, num_scales: Any,
    mean_steps: Any, mean_codes: Any, bases: Any, scales: Any, mins: Any, symbols: Any,
) -> bool:  # fmt: skip
    """Write the planes into `bits`; False when a digit is not a level."""
    width = mean_codes.shape[1]
    mean = np.zeros(width, np.float32)
    ones = np.ones(width, np.float32)
    word = np.zeros(1, np.float32)
    word_bits = word.view(np.uint32)
    steps_all = np.empty(num_scales.max(), np.float32)
    lows_all = np.empty(num_scales.max(), np.float32)
    found = np.empty((8, _TILE * width), np.float32)
    rest = np.empty(_TILE * width, np.float32)
    tile = np.empty((_TILE, width), np.float32)
    turned = np.empty((_TILE, width), np.float32)
    for p in range(planes_at.shape[0]):
        word_bits[0] = np.uint32(mean_steps[p]) << np.uint32(16)
        for d in range(width):
            mean[d] = np.float32(mean_codes[p, d]) * word[0]
        sign = signs[p] if is_rotated else ones
        for g in range(segment_ints.shape[0]):
            begin, end, axis, group, is_symmetric, _ = segment_ints[g]
            at = scales_at[g, p]
            steps, lows = steps_all[: num_scales[g]], lows_all[: 0 if is_symmetric else num_scales[g]]
            steps_bits, lows_bits = steps.view(np.uint32), lows.view(np.uint32)
            for i in range(steps.shape[0]):
                steps_bits[i] = np.uint32((np.int64(bases[g, p]) + np.int64(scales[at + i])) << 19)
            for i in range(lows.shape[0]):
                lows_bits[i] = np.uint32(mins[at + i]) << np.uint32(16)
            count_levels, per_byte = levels[g, p], digits[g, p]
            centre = np.float32((count_levels - 1) / 2)
            num_tokens = end - begin
            each = -(-width // per_byte)
            held = symbols[symbols_at[g, p] : symbols_at[g, p] + num_tokens * each]
            if not _is_valid(held, count_levels**per_byte):
                return False
            for first in range(0, num_tokens, _TILE):
                count = min(_TILE, num_tokens - first)
                _unpack(held[first * each : (first + count) * each], per_byte, count_levels, rest, found)
                _spread(found, per_byte, count, tile)
                if is_symmetric and (axis == TOKEN or axis == TENSOR):  # noqa: SIM109
                    _scale(tile, first, count, axis, centre, steps)
                else:
                    _scale_any(tile, first, count, axis, group, centre, steps, lows)
                if is_rotated:
                    rotate(tile.reshape(-1), count, width, sizes, part_scales)
                _add(tile, count, sign, mean)
                done = tile
                if has_rope:
                    _redo_rope(tile, count, cos, sin, begin - start + first, turned)
                    done = turned
                out_at = planes_at[p] * plane_values + (begin + first) * width
                _narrow(done.reshape(-1).view(np.uint32), count * width, is_bfloat16, bits, out_at)
    return True
