"""The quantised codec's kernels for CUDA tensors, in Triton. What they compute is defined by `reference`.

All work on float32 planes ``[P, T, D]``, contiguous, D a power of two. Bit equality rests on: one program adds the
tokens of a block in order; products and sums are never fused (they are launched with ``enable_fp_fusion=False``); and
rounding to nearest even by adding and subtracting 1.5 * 2 ** 23, which is exact for the levels that there are.
"""

# mypy: ignore-errors
# ruff: noqa: N803  # compile-time constants are upper case, as Triton's own kernels have them

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23


@triton.jit
def _hadamard(y, factor, TOKENS: tl.constexpr, D: tl.constexpr, LOG_D: tl.constexpr):
    """Butterflies over pairs at distance D / 2, D / 4, ... 1, then the factor."""
    for step in tl.static_range(LOG_D):
        half: tl.constexpr = D >> (step + 1)
        pairs = tl.permute(tl.reshape(y, (TOKENS, D // (2 * half), 2, half)), (0, 1, 3, 2))
        u, w = tl.split(pairs)
        y = tl.reshape(tl.permute(tl.join(u + w, u - w), (0, 1, 3, 2)), (TOKENS, D))
    return y * factor


@triton.jit
def block_sums(x, out, num_tokens, num_blocks, SQUARES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Add up the tokens of one block of one plane, in order: ``out[P, blocks, D]``."""
    plane, block = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, D)
    total = tl.zeros((D,), dtype=tl.float32)
    stop = tl.minimum((block + 1) * BLOCK, num_tokens)
    for token in range(block * BLOCK, stop):
        row = tl.load(x + (plane * num_tokens + token) * D + channels)
        if SQUARES:
            row = row * row
        total = total + row
    tl.store(out + (plane * num_blocks + block) * D + channels, total)


@triton.jit
def sums_in_order(x, out, num_rows, WIDTH: tl.constexpr):
    """Add up ``x[P, rows, WIDTH]`` over its rows, one after the other: ``out[P, WIDTH]``."""
    plane = tl.program_id(0)
    lanes = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for row in range(num_rows):
        total = total + tl.load(x + (plane * num_rows + row) * WIDTH + lanes)
    tl.store(out + plane * WIDTH + lanes, total)


@triton.jit
def rotate(
    y, signs, factor, num_tokens, IS_INVERSE: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, LOG_D: tl.constexpr
):
    """Signs, then the transform, in place; or the transform, then the signs."""
    plane, tile = tl.program_id(0), tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, D)
    at = y + (plane * num_tokens + tokens[:, None]) * D + channels[None, :]
    is_there = (tokens < num_tokens)[:, None] & (channels >= 0)[None, :]
    held = tl.load(at, mask=is_there, other=0.0)
    sign = tl.load(signs + plane * D + channels)[None, :]
    if IS_INVERSE:
        held = _hadamard(held, factor, TOKENS, D, LOG_D) * sign
    else:
        held = _hadamard(held * sign, factor, TOKENS, D, LOG_D)
    tl.store(at, held, mask=is_there)


@triton.jit
def _scale_at(tokens, channels, group_tokens, D: tl.constexpr, AXIS: tl.constexpr):
    """Return which scale of its plane each value has: axis 0 token, 1 group, 2 channel, 3 tensor."""
    if AXIS == 0:
        return tokens[:, None] + channels[None, :] * 0
    if AXIS == 1:
        return (tokens[:, None] // group_tokens) * D + channels[None, :]
    if AXIS == 2:
        return tokens[:, None] * 0 + channels[None, :]
    return tokens[:, None] * 0 + channels[None, :] * 0


@triton.jit
def quantise(
    y,
    inverse,
    lows,
    levels,
    digits,
    symbols_at,
    symbols,
    num_tokens,
    first,
    stop,
    num_scales,
    group_tokens,
    IS_SYMMETRIC: tl.constexpr,
    AXIS: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
):
    """Levels of tokens [first, stop) of one plane, packed as digits into its bytes of `symbols`."""
    plane, tile = tl.program_id(0), tl.program_id(1)
    count, per_byte = tl.load(levels + plane).to(tl.int32), tl.load(digits + plane).to(tl.int32)
    highest = count.to(tl.float32) - 1.0
    width = (D + per_byte - 1) // per_byte
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    lanes = tl.arange(0, D)
    packed = tl.zeros((TOKENS, D), dtype=tl.int32)
    place = count * 0 + 1
    for digit in range(8):  # as many as two levels have
        channels = digit * width + lanes
        is_there = (tokens < stop - first)[:, None] & ((lanes < width) & (channels < D))[None, :]
        value = tl.load(y + (plane * num_tokens + first + tokens[:, None]) * D + channels[None, :], is_there, 0.0)
        scale_at = plane * num_scales + _scale_at(tokens, channels, group_tokens, D, AXIS)
        scale = tl.load(inverse + scale_at, is_there, 0.0)
        if IS_SYMMETRIC:
            level = value * scale + highest * 0.5
        else:
            level = (value - tl.load(lows + scale_at, is_there, 0.0)) * scale
        level = tl.minimum(tl.maximum(level, 0.0), highest)
        level = (level + _ROUND) - _ROUND
        packed += tl.where(is_there, level.to(tl.int32) * place, 0)
        place = place * tl.where(digit + 1 < per_byte, count, 0)
    at = symbols + tl.load(symbols_at + plane) + tokens[:, None] * width + lanes[None, :]
    tl.store(at, packed.to(tl.uint8), mask=(tokens < stop - first)[:, None] & (lanes < width)[None, :])


@triton.jit
def dequantise(
    symbols,
    steps,
    lows,
    levels,
    digits,
    symbols_at,
    y,
    num_tokens,
    first,
    stop,
    num_scales,
    group_tokens,
    IS_SYMMETRIC: tl.constexpr,
    AXIS: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
):
    """Values of tokens [first, stop) of one plane from its bytes of `symbols`."""
    plane, tile = tl.program_id(0), tl.program_id(1)
    count, per_byte = tl.load(levels + plane).to(tl.int32), tl.load(digits + plane).to(tl.int32)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, D)
    is_there = (tokens < stop - first)[:, None] & (channels >= 0)[None, :]
    width = (D + per_byte - 1) // per_byte
    at = symbols + tl.load(symbols_at + plane) + tokens[:, None] * width + (channels % width)[None, :]
    left = tl.load(at, is_there, 0).to(tl.int32)
    digit = channels // width
    for turn in range(7):
        left = tl.where((turn < digit)[None, :], left // count, left)
    level = (left % count).to(tl.float32)
    scale_at = plane * num_scales + _scale_at(tokens, channels, group_tokens, D, AXIS)
    step = tl.load(steps + scale_at, is_there, 0.0)
    if IS_SYMMETRIC:
        value = (level - (count.to(tl.float32) - 1.0) * 0.5) * step
    else:
        value = level * step
        value = value + tl.load(lows + scale_at, is_there, 0.0)
    tl.store(y + (plane * num_tokens + first + tokens[:, None]) * D + channels[None, :], value, is_there)
