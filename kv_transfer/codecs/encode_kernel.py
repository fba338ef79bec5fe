"""The encoding arithmetic of `reference` in numba: fused, plane by plane, without the GIL; equal bit for bit.

Nothing here checks bounds: callers hand over arrays whose extents a `HalfPlan` has fixed. No fast-math: LLVM then
neither contracts to fused multiply-adds nor reorders. Numbers are typed with care, because numba widens ``float32 *
float64`` and ``uint32 + int64``; reductions over magnitudes run on the bits, since integers vectorise.

A function works on a whole tile, never on one row: passing a row costs as much as its arithmetic. Loops read one array
and write another, or LLVM does not vectorise them.
"""

# mypy: disable-error-code="return-value,assignment,arg-type,operator"

from typing import Any

import numpy as np

from core.compiled import compiled
from kv_transfer.codecs.butterflies import rotate_rows

BLOCK = 32  # tokens that are summed before they are added to the sum; a tile
LAST_WORD = 3568  # steps from 2 ** 96 on are not coded: nothing that is decoded can overflow
LAST_BFLOAT16 = 0x6F80  # the same for means and least values
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even
TOKEN, GROUP, CHANNEL, TENSOR = 0, 1, 2, 3

_F0 = np.float32(0)
_F1 = np.float32(1)
_TINY = np.float32(2.0**-126)
_ABS = np.uint32(0x7FFFFFFF)


@compiled
def rotate(flat: Any, num_rows: int, width: int, sizes: Any, scales: Any) -> None:
    """Transform every part of every row."""
    start = 0
    for part in range(sizes.shape[0]):
        rotate_rows(flat, num_rows, width, start, sizes[part], scales[part])
        start += sizes[part]


@compiled
def _widen(bits: Any, is_bfloat16: bool, at: int, num_values: int, out: Any) -> None:
    source = bits[at : at + num_values]
    if is_bfloat16:
        for i in range(num_values):
            out[i] = np.uint32(source[i]) << np.uint32(16)
    else:
        for i in range(num_values):
            out[i] = np.uint32(source[i])


@compiled
def _undo_rope(x: Any, cos: Any, sin: Any, first: int, num_tokens: int, out: Any) -> None:
    half = cos.shape[1]
    for t in range(num_tokens):
        u, w, c, s = x[t, :half], x[t, half:], cos[first + t], sin[first + t]
        a, b = out[first + t, :half], out[first + t, half:]
        for i in range(half):
            a[i] = u[i] * c[i] + w[i] * s[i]
        for i in range(half):
            b[i] = w[i] * c[i] - u[i] * s[i]


@compiled
def _load(
    bits: Any, is_bfloat16: bool, at: int, has_rope: bool, cos: Any, sin: Any, tile: Any, y: Any, total: Any, block: Any
) -> None:
    """Fill in y; `total` becomes the sum over tokens."""
    num_tokens, width = y.shape
    tile_bits, y_bits = tile.reshape(-1).view(np.uint32), y.reshape(-1).view(np.uint32)
    total[:] = _F0
    for first in range(0, num_tokens, BLOCK):
        count = min(BLOCK, num_tokens - first)
        if has_rope:
            _widen(bits, is_bfloat16, at + first * width, count * width, tile_bits)
            _undo_rope(tile, cos, sin, first, count, y)
        else:
            _widen(bits, is_bfloat16, at + first * width, count * width, y_bits[first * width :])
        block[:] = _F0
        for t in range(first, first + count):
            row = y[t]
            for d in range(width):
                block[d] += row[d]
        for d in range(width):
            total[d] += block[d]


@compiled
def _mean(total: Any, num_tokens: int, word: Any, codes: Any, mean: Any) -> int:
    """Turn the sum into codes and the coded mean; return the bits of the step."""
    scale = np.float32(1.0 / num_tokens)
    largest = _F0
    for d in range(total.shape[0]):
        total[d] *= scale
        largest = max(largest, abs(total[d]))
    word[0] = largest / np.float32(127)
    bits = word.view(np.uint32)
    step_bits = (np.int64(bits[0]) + 0xFFFF) >> 16
    bits[0] = np.uint32(step_bits << 16)
    step = word[0]
    inverse = _F0 if step < _TINY else _F1 / step
    for d in range(total.shape[0]):
        code = min(max(total[d] * inverse, np.float32(-127)), np.float32(127))
        code = (code + MAGIC) - MAGIC
        codes[d] = np.int8(code)
        mean[d] = code * step
    return step_bits


@compiled
def _subtract(y: Any, mean: Any, sign: Any) -> None:
    for t in range(y.shape[0]):
        row = y[t]
        for d in range(row.shape[0]):
            row[d] = (row[d] - mean[d]) * sign[d]


@compiled
def _rms(y: Any, total: Any, block: Any) -> Any:
    num_tokens, width = y.shape
    total[:] = _F0
    for first in range(0, num_tokens, BLOCK):
        block[:] = _F0
        for t in range(first, min(first + BLOCK, num_tokens)):
            row = y[t]
            for d in range(width):
                block[d] += row[d] * row[d]
        for d in range(width):
            total[d] += block[d]
    square = _F0
    for d in range(width):
        square += total[d]
    return np.sqrt(square * np.float32(1.0 / (num_tokens * width)))


@compiled
def _largest(y: Any, axis: int, group: int, factor: Any, raws: Any) -> None:
    """Fill in the unrounded steps of symmetric levels from the largest magnitudes."""
    num_tokens, width = y.shape
    bits = y.view(np.uint32)
    found = raws.view(np.uint32)
    if axis == TOKEN or axis == TENSOR:  # noqa: SIM109 (a tuple test is not compiled as well)
        overall = np.uint32(0)
        for t in range(num_tokens):
            most = np.uint32(0)
            row = bits[t]
            for d in range(width):
                most = max(most, row[d] & _ABS)
            if axis == TOKEN:
                found[t] = most
            overall = max(overall, most)
        if axis == TENSOR:
            found[0] = overall
    else:
        span = group if axis == GROUP else num_tokens
        found[:] = np.uint32(0)
        for t in range(num_tokens):
            row, mine = bits[t], found[t // span * width : t // span * width + width]
            for d in range(width):
                mine[d] = max(mine[d], row[d] & _ABS)
    for i in range(raws.shape[0]):
        raws[i] *= factor


@compiled
def scale_at(axis: int, group: int, width: int, t: int, d: int) -> int:
    """Return which scale a value uses."""
    if axis == TOKEN:
        return t
    if axis == GROUP:
        return t // group * width + d
    return d if axis == CHANNEL else 0


@compiled
def _ranges(y: Any, axis: int, group: int, factor: Any, raws: Any, lows: Any, mins: Any) -> None:
    """Fill in the unrounded steps of asymmetric levels, and their least values."""
    num_tokens, width = y.shape
    lows[:] = np.float32(np.inf)
    raws[:] = np.float32(-np.inf)
    is_bad = False
    for t in range(num_tokens):
        for d in range(width):
            at = scale_at(axis, group, width, t, d)
            is_bad |= not np.isfinite(y[t, d])
            lows[at] = min(lows[at], y[t, d])
            raws[at] = max(raws[at], y[t, d])
    bits = lows.view(np.uint32)
    for i in range(raws.shape[0]):
        word = np.int64(bits[i])
        if word == 0x80000000:  # there is one zero
            word = 0
        down = (word >> 16) + (1 if word >> 31 and word & 0xFFFF else 0)
        is_bad |= down & 0x7FFF >= LAST_BFLOAT16
        mins[i] = np.uint16(down)
        bits[i] = np.uint32((down & 0xFFFF) << 16)
        raws[i] = abs(raws[i] - lows[i]) * factor
    if is_bad:
        raws[0] = np.float32(np.inf)


@compiled
def _code_steps(raws: Any, scales: Any) -> int:
    """Round steps up, code them, turn them into what levels are multiplied by. Return the base, -1 if not finite."""
    bits = raws.view(np.uint32)
    largest = 0
    for i in range(raws.shape[0]):
        largest = max(largest, (np.int64(bits[i]) + 0x7FFFF) >> 19)
    if largest >= LAST_WORD:
        return -1
    base = max(largest - 255, 0)
    for i in range(raws.shape[0]):
        scale = max(((np.int64(bits[i]) + 0x7FFFF) >> 19) - base, 0)
        scales[i] = np.uint8(scale)
        bits[i] = np.uint32((base + scale) << 19)
        raws[i] = _F0 if raws[i] < _TINY else _F1 / raws[i]
    return base


@compiled
def _quantise(y: Any, axis: int, levels: int, inverse: Any) -> None:
    """Turn y into symmetric levels of one scale per token or for all."""
    top = np.float32(levels - 1)
    centre = np.float32((levels - 1) / 2)
    for t in range(y.shape[0]):
        row = y[t]
        inv = inverse[t if axis == TOKEN else 0]
        for d in range(row.shape[0]):
            level = row[d] * inv
            level = min(max(level + centre, _F0), top)
            row[d] = (level + MAGIC) - MAGIC


@compiled
def _quantise_any(y: Any, axis: int, group: int, levels: int, inverse: Any, lows: Any) -> None:
    """Turn y into levels of any axis; `lows` is empty when symmetric."""
    num_tokens, width = y.shape
    top = np.float32(levels - 1)
    centre = np.float32((levels - 1) / 2)
    for t in range(num_tokens):
        for d in range(width):
            at = scale_at(axis, group, width, t, d)
            if lows.shape[0]:
                level = (y[t, d] - lows[at]) * inverse[at]
            else:
                level = y[t, d] * inverse[at]
                level = level + centre
            level = min(max(level, _F0), top)
            y[t, d] = (level + MAGIC) - MAGIC


@compiled
def _pack_two(y: Any, count: int, base: Any, out: Any) -> None:
    for t in range(y.shape[0]):
        a, b, packed = y[t, :count], y[t, count:], out[t * count : t * count + count]
        for i in range(count):
            packed[i] = np.uint8(np.int32(a[i] + b[i] * base))


@compiled
def _pack_three(y: Any, count: int, last: int, base: Any, out: Any) -> None:
    square = base * base
    for t in range(y.shape[0]):
        a, b, c = y[t, :count], y[t, count : 2 * count], y[t, 2 * count :]
        packed = out[t * count : t * count + count]
        for i in range(last):
            low = a[i] + b[i] * base
            packed[i] = np.uint8(np.int32(low + c[i] * square))
        for i in range(last, count):
            packed[i] = np.uint8(np.int32(a[i] + b[i] * base))


@compiled
def _pack(y: Any, levels: int, digits: int, out: Any) -> None:
    """Put the levels of each token into bytes."""
    num_tokens, width = y.shape
    count = -(-width // digits)
    base = np.float32(levels)
    if digits == 1:
        flat = y.reshape(-1)
        for i in range(flat.shape[0]):
            out[i] = np.uint8(np.int32(flat[i]))
    elif digits == 2 and width == 2 * count:
        _pack_two(y, count, base, out)
    elif digits == 3 and width > 2 * count:
        _pack_three(y, count, width - 2 * count, base, out)
    else:
        for t in range(num_tokens):
            for i in range(count):
                total = y[t, i]
                place = base
                for d in range(i + count, width, count):
                    total += y[t, d] * place
                    place = place * base
                out[t * count + i] = np.uint8(np.int32(total))


@compiled
def encode_half(
    bits: Any, is_bfloat16: bool, plane_values: int, planes_at: Any, start: int, stop: int, is_centred: bool,
    is_rotated: bool, signs: Any, sizes: Any, part_scales: Any, has_rope: bool, cos: Any, sin: Any,
    segment_ints: Any, levels: Any, digits: Any, factors: Any, symbols_at: Any, scales_at: Any, num_scales: Any,
    mean_steps: Any, mean_codes: Any, bases: Any, scales: Any, mins: Any, symbols: Any, y: Any,
) -> bool:  # fmt: skip
    """Fill in the outputs (the last but `y`, which is working memory); False when a value is not finite."""
    num_tokens, width = y.shape
    rows = np.zeros((4, width), np.float32)
    total, block, mean, ones = rows[0], rows[1], rows[2], rows[3]
    ones[:] = _F1
    tile = np.empty((BLOCK, width), np.float32)
    word = np.zeros(1, np.float32)
    raws_all = np.empty(num_scales.max(), np.float32)
    lows_all = np.empty(num_scales.max(), np.float32)
    for p in range(planes_at.shape[0]):
        _load(bits, is_bfloat16, planes_at[p] * plane_values + start * width, has_rope, cos, sin, tile, y, total, block)
        if is_centred:
            step_bits = _mean(total, num_tokens, word, mean_codes[p], mean)
            if step_bits >= LAST_BFLOAT16:
                return False
            mean_steps[p] = step_bits
        if is_centred or is_rotated:
            _subtract(y, mean, signs[p] if is_rotated else ones)
        for g in range(segment_ints.shape[0]):
            first, last, axis, group, is_symmetric, has_rms = segment_ints[g]
            part = y[first - start : last - start]
            raws, lows = raws_all[: num_scales[g]], lows_all[: num_scales[g]]
            if has_rms:
                raws[0] = _rms(part, total, block) * factors[g, p]
            if is_rotated:
                rotate(part.reshape(-1), last - first, width, sizes, part_scales)
            at = scales_at[g, p]
            if not has_rms:
                if is_symmetric:
                    _largest(part, axis, group, factors[g, p], raws)
                else:
                    _ranges(part, axis, group, factors[g, p], raws, lows, mins[at : at + num_scales[g]])
            base = _code_steps(raws, scales[at : at + num_scales[g]])
            if base < 0:
                return False
            bases[g, p] = base
            if is_symmetric and (axis == TOKEN or axis == TENSOR):  # noqa: SIM109
                _quantise(part, axis, levels[g, p], raws)
            else:
                some = lows[: 0 if is_symmetric else lows.shape[0]]
                _quantise_any(part, axis, group, levels[g, p], raws, some)
            _pack(part, levels[g, p], digits[g, p], symbols[symbols_at[g, p] :])
    return True
