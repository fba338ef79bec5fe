"""Kernels between the matrix products of a decoder layer: residual + RMSNorm, rotary + KV write, SwiGLU.

Each reads and writes every value once, with the roundings that the transformers modules make (a bfloat16 result after
each step that they make), so that a fused layer equals the plain one up to the order of sums.
Every public name is the address pair of a kernel: {dtype: address}.
"""

# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call"

import math
from typing import Any

import numpy as np
from numba import carray, types

from engine.kernels.lowlevel import exp, inlined, kernel, load, pointer, rounded, store, take_item

_ROWS = 4  # per item, so that the counter is not the bottleneck
_ANY = 1 << 48  # length of arrays whose bounds the caller keeps


@inlined
def _add_rms_norm(data, element):
    words = carray(data, 9, np.int64)
    floats = carray(data, 9, np.float64)
    num_rows, width = words[5], words[6]
    hidden = carray(pointer(words[1]), num_rows * width, element)
    has_delta = words[2] != 0
    delta = carray(pointer(words[2]), num_rows * width, element)
    weight = carray(pointer(words[3]), width, element)
    out = carray(pointer(words[4]), num_rows * width, element)
    eps = types.float32(floats[7])
    while True:
        first = take_item(data) * _ROWS
        if first >= num_rows:
            return
        for row in range(first, min(first + _ROWS, num_rows)):
            base = row * width
            total = types.float32(0.0)
            if has_delta:
                for i in range(width):
                    value = rounded(hidden, load(hidden, base + i) + load(delta, base + i))
                    store(hidden, base + i, value)
                    total += value * value
            else:
                for i in range(width):
                    value = load(hidden, base + i)
                    total += value * value
            scale = types.float32(1.0) / types.float32(math.sqrt(total / types.float32(width) + eps))
            for i in range(width):
                store(out, base + i, load(weight, i) * rounded(out, load(hidden, base + i) * scale))


def _add_rms_norm_f32(data):
    _add_rms_norm(data, np.float32)


def _add_rms_norm_bf16(data):
    _add_rms_norm(data, np.uint16)


@inlined
def _swiglu(data, element):
    words = carray(data, 5, np.int64)
    num_rows, width = words[3], words[4]
    gate_up = carray(pointer(words[1]), num_rows * width * 2, element)
    out = carray(pointer(words[2]), num_rows * width, element)
    one = types.float32(1.0)
    while True:
        row = take_item(data)
        if row >= num_rows:
            return
        gate, up, base = row * width * 2, row * width * 2 + width, row * width
        for i in range(width):
            x = load(gate_up, gate + i)
            activated = rounded(out, x / (one + exp(-x)))
            store(out, base + i, activated * load(gate_up, up + i))


def _swiglu_f32(data):
    _swiglu(data, np.float32)


def _swiglu_bf16(data):
    _swiglu(data, np.uint16)


@inlined
def _norm_head(row, base, dim, weight, eps, out):
    """RMSNorm of one head into float32 `out`."""
    total = types.float32(0.0)
    for i in range(dim):
        value = load(row, base + i)
        total += value * value
    scale = types.float32(1.0) / types.float32(math.sqrt(total / types.float32(dim) + eps))
    for i in range(dim):
        store(out, i, rounded(row, load(weight, i) * rounded(row, load(row, base + i) * scale)))


@inlined
def _rotary_to_pool(data, element):
    words = carray(data, 17, np.int64)
    floats = carray(data, 17, np.float64)
    num_rows, num_heads, num_kv_heads, dim = words[2], words[3], words[4], words[5]
    block_size, block_stride = words[6], words[7]
    stride = (num_heads + 2 * num_kv_heads) * dim
    half = dim // 2
    qkv = carray(pointer(words[1]), num_rows * stride, element)
    positions = carray(pointer(words[8]), num_rows, np.int64)
    slots = carray(pointer(words[9]), num_rows, np.int64)
    cosines = carray(pointer(words[10]), _ANY, np.float32)
    sines = carray(pointer(words[11]), _ANY, np.float32)
    pool = carray(pointer(words[12]), _ANY, element)  # starts at this layer's keys of block 0
    has_norm = words[13] != 0
    query_norm = carray(pointer(words[13]), dim, element)
    key_norm = carray(pointer(words[14]), dim, element)
    eps = types.float32(floats[15])
    head = np.empty(dim, np.float32)
    head_stride = block_size * dim
    while True:
        first = take_item(data) * _ROWS
        if first >= num_rows:
            return
        for row in range(first, min(first + _ROWS, num_rows)):
            table = positions[row] * half
            block, offset = divmod(slots[row], block_size)
            target = block * block_stride + offset * dim
            for h in range(num_heads + num_kv_heads):
                base = row * stride + h * dim
                if has_norm:
                    if h < num_heads:
                        _norm_head(qkv, base, dim, query_norm, eps, head)
                    else:
                        _norm_head(qkv, base, dim, key_norm, eps, head)
                else:
                    for i in range(dim):
                        store(head, i, load(qkv, base + i))
                if h < num_heads:
                    for i in range(half):
                        cos, sin = load(cosines, table + i), load(sines, table + i)
                        store(qkv, base + i, load(head, i) * cos - load(head, half + i) * sin)
                        store(qkv, base + half + i, load(head, half + i) * cos + load(head, i) * sin)
                else:
                    key = target + (h - num_heads) * head_stride
                    for i in range(half):
                        cos, sin = load(cosines, table + i), load(sines, table + i)
                        store(pool, key + i, load(head, i) * cos - load(head, half + i) * sin)
                        store(pool, key + half + i, load(head, half + i) * cos + load(head, i) * sin)
            value = row * stride + (num_heads + num_kv_heads) * dim
            target += num_kv_heads * head_stride
            for h in range(num_kv_heads):
                for i in range(dim):
                    store(pool, target + h * head_stride + i, load(qkv, value + h * dim + i))


def _rotary_to_pool_f32(data):
    _rotary_to_pool(data, np.float32)


def _rotary_to_pool_bf16(data):
    _rotary_to_pool(data, np.uint16)


def add_rms_norm(dtype: str) -> tuple[int, str]:
    """hidden += delta (if any); out = weight * rms_normalised(hidden).

    Words: hidden, delta or 0, weight, out, rows, width, eps.
    """
    return _compiled(_add_rms_norm_f32, _add_rms_norm_bf16, dtype), "qqqqqqd"


def swiglu(dtype: str) -> tuple[int, str]:
    """out = silu(gate) * up. Words: gate_up [rows, 2, width], out [rows, width], rows, width."""
    return _compiled(_swiglu_f32, _swiglu_bf16, dtype), "qqqq"


def rotary_to_pool(dtype: str) -> tuple[int, str]:
    """Normalise (if asked) and rotate q in place; normalise, rotate k and copy v into the pool.

    Words: qkv [rows, (H + 2K) * D], rows, H, K, D, S, elements from block to block of the pool, positions, slots,
    cosines and sines [*, D / 2] float32, pool at this layer, query norm or 0, key norm, eps.
    """
    return _compiled(_rotary_to_pool_f32, _rotary_to_pool_bf16, dtype), "qqqqqqqqqqqqqqd"


_CACHE: dict[Any, int] = {}


def _compiled(float32: Any, bfloat16: Any, dtype: str) -> int:
    function = {"float32": float32, "bfloat16": bfloat16}[dtype]
    if function not in _CACHE:
        _CACHE[function] = kernel(function)
    return _CACHE[function]
