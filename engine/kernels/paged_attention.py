"""Attention that reads keys and values where they lie: in the blocks of the paged pool.

One item is one query token and one kv head with its G query heads: the keys of the context are visited block by block
with an online softmax, each key and value row read (and widened from bfloat16) once for all G heads. Nothing is
gathered or padded. Source: online softmax of Milakov and Gimelshein; paged reads as in vLLM's PagedAttention.
"""

# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call"

import numpy as np
from numba import carray, types

from engine.kernels.lowlevel import exp, inlined, kernel, load, pointer, store, take_item

_ANY = 1 << 48  # length of arrays whose bounds the caller keeps


@inlined
def _paged_attention(data, element):
    words = carray(data, 19, np.int64)
    floats = carray(data, 19, np.float64)
    num_items, num_heads, num_kv_heads, dim = words[3], words[4], words[5], words[6]
    block_size, block_stride, table_width, query_stride = words[7], words[8], words[9], words[10]
    query = carray(pointer(words[1]), _ANY, element)
    out = carray(pointer(words[2]), _ANY, element)
    pool = carray(pointer(words[11]), _ANY, element)  # starts at this layer's keys of block 0
    block_tables = carray(pointer(words[12]), _ANY, np.int32)
    rows = carray(pointer(words[13]), num_items, np.int64)  # of query and out
    sequences = carray(pointer(words[14]), num_items, np.int64)  # row of block_tables
    positions = carray(pointer(words[15]), num_items, np.int64)
    window = words[16]
    scaling = types.float32(floats[17])
    group = num_heads // num_kv_heads
    values_offset = num_kv_heads * block_size * dim
    scaled = np.empty(group * dim, np.float32)
    total = np.empty(group * dim, np.float32)
    scores = np.empty(group * block_size, np.float32)
    highest = np.empty(group, np.float32)
    weight_sum = np.empty(group, np.float32)
    while True:
        item = take_item(data)
        if item >= num_items * num_kv_heads:
            return
        query_idx, kv_head = item // num_kv_heads, item % num_kv_heads
        row = rows[query_idx]
        query_base = row * query_stride + kv_head * group * dim
        for i in range(group * dim):
            store(scaled, i, load(query, query_base + i) * scaling)
            store(total, i, types.float32(0.0))
        for g in range(group):
            highest[g] = types.float32(-np.inf)
            weight_sum[g] = types.float32(0.0)
        table = sequences[query_idx] * table_width
        stop = positions[query_idx] + 1
        start = max(0, stop - window) if window > 0 else 0
        for block in range(start // block_size, (stop + block_size - 1) // block_size):
            low = max(start - block * block_size, 0)
            high = min(stop - block * block_size, block_size)
            keys = np.int64(block_tables[table + block]) * block_stride + kv_head * block_size * dim
            values = keys + values_offset
            for s in range(low, high):
                for g in range(group):
                    score = types.float32(0.0)
                    for i in range(dim):
                        score += load(scaled, g * dim + i) * load(pool, keys + s * dim + i)
                    store(scores, g * block_size + s, score)
            for g in range(group):
                peak = highest[g]
                for s in range(low, high):
                    peak = max(peak, load(scores, g * block_size + s))
                correction = exp(highest[g] - peak)
                highest[g] = peak
                added = types.float32(0.0)
                for s in range(low, high):
                    weight = exp(load(scores, g * block_size + s) - peak)
                    store(scores, g * block_size + s, weight)
                    added += weight
                weight_sum[g] = weight_sum[g] * correction + added
                for i in range(dim):
                    store(total, g * dim + i, load(total, g * dim + i) * correction)
            for s in range(low, high):
                for g in range(group):
                    weight = load(scores, g * block_size + s)
                    for i in range(dim):
                        at = g * dim + i
                        store(total, at, load(total, at) + weight * load(pool, values + s * dim + i))
        out_base = row * num_heads * dim + kv_head * group * dim
        for g in range(group):
            inverse = types.float32(1.0) / weight_sum[g]
            for i in range(dim):
                store(out, out_base + g * dim + i, load(total, g * dim + i) * inverse)


def _paged_attention_f32(data):
    _paged_attention(data, np.float32)


def _paged_attention_bf16(data):
    _paged_attention(data, np.uint16)


_CACHE: dict[str, int] = {}


def paged_attention(dtype: str) -> tuple[int, str]:
    """Attention of n query tokens, each over its own context up to and including its own position.

    Words: query [*, stride], out [*, H, D], n, H, K, D, S, elements from block to block of the pool, width of the
    block tables, query stride, pool at this layer, block tables int32, then int64 [n] each: row of query and out,
    sequence (row of the block tables), position; window or 0, scaling.
    """
    if dtype not in _CACHE:
        _CACHE[dtype] = kernel({"float32": _paged_attention_f32, "bfloat16": _paged_attention_bf16}[dtype])
    return _CACHE[dtype], "qqqqqqqqqqqqqqqqd"
