"""The arithmetic of `reference` in numba: fused, one plane at a time, without the GIL; equal bit for bit.

Nothing here checks bounds: callers hand over arrays whose extents a `HalfPlan` has fixed. No fast-math: LLVM then
neither contracts to fused multiply-adds nor reorders. Numbers are typed with care, because numba widens ``float32 *
float64`` and ``uint32 + int64``; reductions over magnitudes run on the bits, since integers vectorise.
"""

# mypy: disable-error-code="untyped-decorator"

from typing import Any

import numpy as np
from numba import njit

from kv_transfer.codecs.butterflies import hadamard

BLOCK = 32
_F0 = np.float32(0)
_F1 = np.float32(1)
_HALF = np.float32(0.5)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even
_TINY = np.float32(2.0**-126)
_ABS = np.uint32(0x7FFFFFFF)
_NOT_FINITE = np.uint32(0x7F800000)
_TOKEN, _GROUP, _CHANNEL = 0, 1, 2
_LAST_WORD = 0xFF0

_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _load(bits: Any, at: int, num_values: int, out: Any) -> None:
    if bits.itemsize == 2:
        for i in range(num_values):
            out[i] = np.uint32(bits[at + i]) << np.uint32(16)
    else:
        for i in range(num_values):
            out[i] = bits[at + i]


@_compiled
def _undo_rope(y: Any, row: Any, cos: Any, sin: Any) -> None:
    num_tokens, half = cos.shape
    for t in range(num_tokens):
        source, c, s = y[t], cos[t], sin[t]
        row[:] = source
        for i in range(half):
            source[i] = row[i] * c[i] + row[half + i] * s[i]
        for i in range(half):
            source[half + i] = row[half + i] * c[i] - row[i] * s[i]


@_compiled
def _redo_rope(row: Any, spare: Any, c: Any, s: Any) -> None:
    half = c.shape[0]
    spare[:] = row
    for i in range(half):
        row[i] = spare[i] * c[i] - spare[half + i] * s[i]
    for i in range(half):
        row[half + i] = spare[half + i] * c[i] + spare[i] * s[i]


@_compiled
def _sum_tokens(y: Any, is_square: bool, total: Any, block: Any) -> None:
    num_tokens, head_dim = y.shape
    total[:] = _F0
    for start in range(0, num_tokens, BLOCK):
        block[:] = _F0
        for t in range(start, min(start + BLOCK, num_tokens)):
            row = y[t]
            if is_square:
                for d in range(head_dim):
                    block[d] += row[d] * row[d]
            else:
                for d in range(head_dim):
                    block[d] += row[d]
        for d in range(head_dim):
            total[d] += block[d]


@_compiled
def _mean(y: Any, total: Any, block: Any, word: Any, codes: Any, mean: Any) -> int:
    """Fill in codes and the coded mean; return the bits of the step."""
    num_tokens, head_dim = y.shape
    _sum_tokens(y, False, total, block)
    scale = np.float32(1.0 / num_tokens)
    largest = _F0
    for d in range(head_dim):
        total[d] *= scale
        largest = max(largest, abs(total[d]))
    word[0] = largest / np.float32(127)
    step_bits = min((np.int64(word.view(np.uint32)[0]) + 0xFFFF) >> 16, 0x7F7F)
    word.view(np.uint32)[0] = np.uint32(step_bits << 16)
    step = word[0]
    inverse = _F0 if step < _TINY else _F1 / step
    for d in range(head_dim):
        code = min(max(total[d] * inverse, np.float32(-127)), np.float32(127))
        code = (code + _MAGIC) - _MAGIC
        codes[d] = np.int8(code)
        mean[d] = code * step
    return step_bits


@_compiled
def _rotate(row: Any, sizes: Any, scales: Any) -> None:
    start = 0
    for part in range(sizes.shape[0]):
        hadamard(row, start, sizes[part], scales[part])
        start += sizes[part]


@_compiled
def _words(raws: Any, words: Any) -> int:
    """Round steps up to words; return the largest, or -1 when one is not finite."""
    largest = 0
    bits = raws.view(np.uint32)
    for i in range(raws.shape[0]):
        word = (np.int64(bits[i]) + 0x7FFFF) >> 19
        if bits[i] >= _NOT_FINITE or word >= _LAST_WORD:
            return -1
        words[i] = word
        largest = max(largest, word)
    return largest


@_compiled
def _largest(row: Any) -> Any:
    """Return the largest magnitude's bits (of uint32 bits)."""
    found = np.uint32(0)
    for d in range(row.shape[0]):
        found = max(found, row[d] & _ABS)
    return np.uint32(found)


@_compiled
def _spread_of(y: Any, axis: int, group: int, factor: Any, raws: Any) -> None:
    """Fill in the unrounded steps of symmetric levels from the largest magnitudes."""
    num_tokens, head_dim = y.shape
    bits = y.view(np.uint32)
    found = raws.view(np.uint32)
    if axis == _TOKEN:
        for t in range(num_tokens):
            found[t] = _largest(bits[t])
    elif axis == _GROUP or axis == _CHANNEL:
        span = group if axis == _GROUP else num_tokens
        found[:] = np.uint32(0)
        for t in range(num_tokens):
            row = bits[t]
            at = t // span * head_dim
            for d in range(head_dim):
                found[at + d] = max(found[at + d], row[d] & _ABS)
    else:
        most = np.uint32(0)
        for t in range(num_tokens):
            most = max(most, _largest(bits[t]))
        found[0] = most
    for i in range(raws.shape[0]):
        raws[i] *= factor


@_compiled
def _ranges_of(y: Any, axis: int, group: int, factor: Any, raws: Any, lows: Any, mins: Any) -> None:
    """Fill in the unrounded steps of asymmetric levels, and their least values."""
    num_tokens, head_dim = y.shape
    lows[:] = np.float32(np.inf)
    raws[:] = np.float32(-np.inf)
    is_bad = False
    span = group if axis == _GROUP else num_tokens
    for t in range(num_tokens):
        row = y[t]
        for d in range(head_dim):
            at = t if axis == _TOKEN else (t // span * head_dim + d if axis == _GROUP or axis == _CHANNEL else 0)
            is_bad |= not np.isfinite(row[d])
            lows[at] = min(lows[at], row[d])
            raws[at] = max(raws[at], row[d])
    bits = lows.view(np.uint32)
    for i in range(raws.shape[0]):
        word = np.int64(bits[i])
        down = (word >> 16) + (1 if word >> 31 and word & 0xFFFF else 0)
        mins[i] = np.uint16(down)
        bits[i] = np.uint32((down & 0xFFFF) << 16)
        raws[i] = (raws[i] - lows[i]) * factor
    if is_bad:
        raws[0] = np.float32(np.nan)


@_compiled
def _quantise(
    y: Any, axis: int, group: int, levels: int, digits: int, inverse: Any, lows: Any, acc: Any, out: Any
) -> None:
    """Levels of all tokens, packed. `lows` is empty when symmetric."""
    num_tokens, head_dim = y.shape
    is_symmetric = lows.shape[0] == 0
    top = np.float32(levels - 1)
    centre = np.float32((levels - 1) / 2)
    at_out = 0
    for first in range(0, num_tokens, digits):
        place = _F1
        for t in range(first, min(first + digits, num_tokens)):
            row = y[t]
            if is_symmetric and (axis == _TOKEN or axis > _CHANNEL):
                inv = inverse[t if axis == _TOKEN else 0]
                if t == first:
                    for d in range(head_dim):
                        level = row[d] * inv
                        level = level + centre
                        level = min(max(level, _F0), top)
                        acc[d] = (level + _MAGIC) - _MAGIC
                else:
                    for d in range(head_dim):
                        level = row[d] * inv
                        level = level + centre
                        level = min(max(level, _F0), top)
                        acc[d] += ((level + _MAGIC) - _MAGIC) * place
            else:
                at = t // group * head_dim if axis == _GROUP else 0
                if t == first:
                    acc[:] = _F0
                for d in range(head_dim):
                    i = t if axis == _TOKEN else (at + d if axis == _GROUP or axis == _CHANNEL else 0)
                    if is_symmetric:
                        level = row[d] * inverse[i]
                        level = level + centre
                    else:
                        level = (row[d] - lows[i]) * inverse[i]
                    level = min(max(level, _F0), top)
                    acc[d] += ((level + _MAGIC) - _MAGIC) * place
            place = place * np.float32(levels)
        for d in range(head_dim):
            out[at_out + d] = np.uint8(np.int32(acc[d]))
        at_out += head_dim


@_compiled
def encode_half(
    bits: Any, plane_values: int, planes_at: Any, start: int, stop: int, is_centred: bool,
    is_rotated: bool, signs: Any, sizes: Any, part_scales: Any, has_rope: bool, cos: Any, sin: Any,
    segment_ints: Any, levels: Any, digits: Any, factors: Any, symbols_at: Any, scales_at: Any, num_scales: Any,
    mean_steps: Any, mean_codes: Any, bases: Any, scales: Any, mins: Any, symbols: Any,
) -> bool:  # fmt: skip
    """Fill in the outputs (the last six); False when a value is not finite."""
    head_dim = mean_codes.shape[1]
    num_tokens = stop - start
    y = np.empty((num_tokens, head_dim), np.float32)
    rows = np.empty((4, head_dim), np.float32)
    total, block, mean, row = rows[0], rows[1], rows[2], rows[3]
    word = np.zeros(1, np.float32)
    most = 0
    for g in range(num_scales.shape[0]):
        most = max(most, num_scales[g])
    raws_all = np.empty(most, np.float32)
    lows_all = np.empty(most, np.float32)
    words_all = np.empty(most, np.int64)
    for p in range(planes_at.shape[0]):
        _load(
            bits, planes_at[p] * plane_values + start * head_dim, num_tokens * head_dim, y.reshape(-1).view(np.uint32)
        )
        if has_rope:
            _undo_rope(y, row, cos, sin)
        if is_centred:
            mean_steps[p] = _mean(y, total, block, word, mean_codes[p], mean)
            for t in range(num_tokens):
                line = y[t]
                for d in range(head_dim):
                    line[d] -= mean[d]
        for g in range(segment_ints.shape[0]):
            first, last, axis, group, is_symmetric, has_rms = segment_ints[g]
            part = y[first - start : last - start]
            raws, lows, words = raws_all[: num_scales[g]], lows_all[: num_scales[g]], words_all[: num_scales[g]]
            factor = factors[g, p]
            if has_rms:
                _sum_tokens(part, True, total, block)
                square = _F0
                for d in range(head_dim):
                    square += total[d]
                raws[0] = np.sqrt(square * np.float32(1.0 / (part.shape[0] * head_dim))) * factor
            if is_rotated:
                sign = signs[p]
                for t in range(part.shape[0]):
                    line = part[t]
                    for d in range(head_dim):
                        line[d] *= sign[d]
                    _rotate(line, sizes, part_scales)
            at = scales_at[g, p]
            if not has_rms:
                if is_symmetric:
                    _spread_of(part, axis, group, factor, raws)
                else:
                    _ranges_of(part, axis, group, factor, raws, lows, mins[at : at + num_scales[g]])
            largest = _words(raws, words)
            if largest < 0:
                return False
            base = max(largest - 255, 0)
            bases[g, p] = base
            inverse_bits = raws.view(np.uint32)
            for i in range(words.shape[0]):
                scale = max(words[i] - base, 0)
                scales[at + i] = np.uint8(scale)
                inverse_bits[i] = np.uint32((base + scale) << 19)
            for i in range(words.shape[0]):
                raws[i] = _F0 if raws[i] < _TINY else _F1 / raws[i]
            out = symbols[symbols_at[g, p] :]
            _quantise(
                part,
                axis,
                group,
                levels[g, p],
                digits[g, p],
                raws,
                lows[: 0 if is_symmetric else lows.shape[0]],
                row,
                out,
            )
    return True


@_compiled
def _levels_of(packed: Any, place: int, digits: int, levels: int, rest: Any, out: Any) -> None:
    """Take the digit number `place` off each byte; `rest` keeps what is left between calls."""
    head_dim = packed.shape[0]
    if digits == 1:
        for d in range(head_dim):
            out[d] = np.float32(packed[d])
        return
    if place == 0:
        for d in range(head_dim):
            rest[d] = np.float32(packed[d])
    base = np.float32(levels)
    inverse = _F1 / base
    for d in range(head_dim):
        above = np.float32(np.int32((rest[d] + _HALF) * inverse))
        out[d] = rest[d] - above * base
        rest[d] = above


@_compiled
def _store(row: Any, bits: Any, at: int) -> None:
    word = row.view(np.uint32)
    if bits.itemsize == 2:
        for d in range(word.shape[0]):
            w = word[d]
            bits[at + d] = np.uint16((w + np.uint32(0x7FFF) + ((w >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    else:
        for d in range(word.shape[0]):
            bits[at + d] = word[d]


@_compiled
def decode_half(
    bits: Any, plane_values: int, planes_at: Any, start: int, is_centred: bool,
    is_rotated: bool, signs: Any, sizes: Any, part_scales: Any, has_rope: bool, cos: Any, sin: Any,
    segment_ints: Any, levels: Any, digits: Any, symbols_at: Any, scales_at: Any, num_scales: Any,
    mean_steps: Any, mean_codes: Any, bases: Any, scales: Any, mins: Any, symbols: Any,
) -> bool:  # fmt: skip
    """Write the planes into `bits`; False when a digit is not a level."""
    head_dim = mean_codes.shape[1]
    rows = np.zeros((5, head_dim), np.float32)
    mean, row, spare, rest, ones = rows[0], rows[1], rows[2], rows[3], rows[4]
    ones[:] = _F1
    word = np.zeros(1, np.float32)
    word_bits = word.view(np.uint32)
    most = 0
    for g in range(num_scales.shape[0]):
        most = max(most, num_scales[g])
    steps_all = np.empty(most, np.float32)
    lows_all = np.empty(most, np.float32)
    for p in range(planes_at.shape[0]):
        word_bits[0] = np.uint32(mean_steps[p]) << np.uint32(16)
        for d in range(head_dim):
            mean[d] = np.float32(mean_codes[p, d]) * word[0]
        sign = signs[p] if is_rotated else ones
        for g in range(segment_ints.shape[0]):
            first, last, axis, group, is_symmetric, _ = segment_ints[g]
            at = scales_at[g, p]
            steps, lows = steps_all[: num_scales[g]], lows_all[: num_scales[g]]
            steps_bits, lows_bits = steps.view(np.uint32), lows.view(np.uint32)
            base = np.int64(bases[g, p])
            for i in range(steps.shape[0]):
                steps_bits[i] = np.uint32((base + np.int64(scales[at + i])) << 19)
            if not is_symmetric:
                for i in range(lows.shape[0]):
                    lows_bits[i] = np.uint32(mins[at + i]) << np.uint32(16)
            level_count, per_byte = levels[g, p], digits[g, p]
            centre = np.float32((level_count - 1) / 2)
            num_tokens = last - first
            num_rows = -(-num_tokens // per_byte)
            held = symbols[symbols_at[g, p] : symbols_at[g, p] + num_rows * head_dim]
            top = np.uint8(0)
            for i in range(held.shape[0]):
                top = max(top, held[i])
            if np.int64(top) >= level_count**per_byte:
                return False
            for t in range(num_tokens):
                place = t % per_byte
                packed = held[t // per_byte * head_dim : (t // per_byte + 1) * head_dim]
                _levels_of(packed, place, per_byte, level_count, rest, row)
                if is_symmetric and (axis == _TOKEN or axis > _CHANNEL):
                    step = steps[t if axis == _TOKEN else 0]
                    for d in range(head_dim):
                        row[d] = (row[d] - centre) * step
                else:
                    group_at = t // group * head_dim if axis == _GROUP else 0
                    for d in range(head_dim):
                        i = t if axis == _TOKEN else (group_at + d if axis == _GROUP or axis == _CHANNEL else 0)
                        if is_symmetric:
                            row[d] = (row[d] - centre) * steps[i]
                        else:
                            value = row[d] * steps[i]
                            row[d] = value + lows[i]
                if is_rotated:
                    _rotate(row, sizes, part_scales)
                    for d in range(head_dim):
                        row[d] *= sign[d]
                for d in range(head_dim):
                    row[d] += mean[d]
                if has_rope:
                    _redo_rope(row, spare, cos[first - start + t], sin[first - start + t])
                _store(row, bits, planes_at[p] * plane_values + (first + t) * head_dim)
    return True
