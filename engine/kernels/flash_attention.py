"""Attention of a prompt chunk: many queries over one context, as products of tiles with an online softmax.

Two kernels. `pack` lays the context's keys and values out as the tile products read them (keys transposed word by word,
values with two bfloat16 rows interleaved), once per layer. `flash` takes one kv head and a tile of query tokens with
all their G heads as rows, and walks over the tiles of 64 keys; scores never leave the first-level cache. Softmax is in
float32; in bfloat16 the weights are rounded before they meet the values. Source: FlashAttention (Dao et al.).
"""

# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call"

import numpy as np
from numba import carray, types

from engine.kernels.lowlevel import exp, inlined, kernel, load, peek, pointer, poke, store, take_item
from engine.kernels.tile import COLUMNS, ROWS, largest, multiply, multiply_add

KEY_TILE = COLUMNS
_QUERY_ROWS = 96  # tokens x G per item
_ANY = 1 << 48
_LOWEST = -1e30  # finite: a row that sees nothing of a tile yet must not become NaN; later tiles wipe it out


@inlined
def _pack(data, pairs):
    words = carray(data, 14, np.int64)
    num_kv_heads, dim, block_size, block_stride = words[3], words[4], words[5], words[6]
    table = carray(pointer(words[7]), _ANY, np.int32)
    first_tile, num_tiles, context_len, pool_address = words[8], words[9], words[10], words[11]
    width = dim // 2 if pairs else dim  # words of a row
    halves = 2 if pairs else 1
    pool = carray(pointer(pool_address), _ANY, np.uint32)  # starts at this layer's keys of block 0
    keys = carray(pointer(words[1]), _ANY, np.uint32)  # [K, tiles, width, 64]
    values = carray(pointer(words[2]), _ANY, np.uint32)  # [K, tiles, 64 / halves, D]
    while True:
        item = take_item(data)
        if item >= num_kv_heads * num_tiles:
            return
        kv_head, tile = item // num_tiles, item % num_tiles
        key_base = item * width * KEY_TILE
        value_base = item * width * KEY_TILE
        for c in range(KEY_TILE):
            position = (first_tile + tile) * KEY_TILE + c
            if position < context_len:
                block, offset = np.int64(table[position // block_size]), position % block_size
                row = (block * block_stride // halves) + (kv_head * block_size + offset) * width
                for w in range(width):
                    poke(keys, key_base + w * KEY_TILE + c, peek(pool, row + w))
            else:
                row = np.int64(-1)
                for w in range(width):
                    poke(keys, key_base + w * KEY_TILE + c, np.uint32(0))
            # values: rows 2i and 2i + 1 interleaved, or as they are
            source = row + num_kv_heads * block_size * width
            if pairs:
                target = value_base + (c // 2) * dim
                shift = np.uint32(16 * (c % 2))
                keep = np.uint32(0x0000FFFF if c % 2 else 0)
                for w in range(width):
                    word = peek(pool, source + w) if row >= 0 else np.uint32(0)
                    low, high = word & np.uint32(0xFFFF), word >> np.uint32(16)
                    at = target + 2 * w
                    poke(values, at, (peek(values, at) & keep) | (low << shift))
                    poke(values, at + 1, (peek(values, at + 1) & keep) | (high << shift))
            else:
                target = value_base + c * dim
                for w in range(width):
                    poke(values, target + w, peek(pool, source + w) if row >= 0 else np.uint32(0))


def _pack_f32(data):
    _pack(data, False)


def _pack_bf16(data):
    _pack(data, True)


@inlined
def _flash(data, element, pairs):
    words = carray(data, 17, np.int64)
    floats = carray(data, 17, np.float64)
    num_tokens, start, num_heads, num_kv_heads, dim = words[3], words[4], words[5], words[6], words[7]
    query_stride, first_tile, num_tiles = words[8], words[9], words[10]
    window, keys_address, values_address = words[11], words[12], words[13]
    scaling = types.float32(floats[14])
    query = carray(pointer(words[1]), _ANY, element)
    out = carray(pointer(words[2]), _ANY, element)
    group = num_heads // num_kv_heads
    width = dim // 2 if pairs else dim
    tile_width = KEY_TILE // 2 if pairs else KEY_TILE
    tile_bytes = 4 * width * KEY_TILE
    tokens_per_item = max(1, _QUERY_ROWS // group)
    num_items = (num_tokens + tokens_per_item - 1) // tokens_per_item
    max_rows = (tokens_per_item * group + ROWS - 1) // ROWS * ROWS
    queries = np.zeros(max_rows * dim, element)
    weights = np.zeros(max_rows * KEY_TILE, element)
    scores = np.zeros(max_rows * KEY_TILE, np.float32)
    total = np.zeros(max_rows * dim, np.float32)
    peaks = np.zeros(max_rows, np.float32)
    tile_peaks = np.zeros(max_rows, np.float32)
    corrections = np.zeros(max_rows, np.float32)
    weight_sum = np.zeros(max_rows, np.float32)
    queries_address, weights_address = queries.ctypes.data, weights.ctypes.data
    scores_address, total_address = scores.ctypes.data, total.ctypes.data
    while True:
        item = take_item(data)
        if item >= num_items * num_kv_heads:
            return
        kv_head = item % num_kv_heads
        first = (num_items - 1 - item // num_kv_heads) * tokens_per_item  # long contexts first: the tail balances
        last = min(first + tokens_per_item, num_tokens)
        num_rows = (last - first) * group
        padded = (num_rows + ROWS - 1) // ROWS * ROWS
        for r in range(num_rows):
            base = (first + r // group) * query_stride + (kv_head * group + r % group) * dim
            for i in range(dim):
                poke(queries, r * dim + i, peek(query, base + i))
        for r in range(padded):
            store(peaks, r, types.float32(_LOWEST))
            store(weight_sum, r, types.float32(0.0))
        for i in range(padded * dim):
            store(total, i, types.float32(0.0))
        low_tile = first_tile
        if window > 0:
            low_tile = max(low_tile, (start + first - window + 1) // KEY_TILE)
        for tile in range(low_tile, (start + last - 1) // KEY_TILE + 1):
            index = kv_head * num_tiles + tile - first_tile
            tile_keys = keys_address + index * tile_bytes
            tile_values = values_address + index * tile_bytes
            for r in range(0, padded, ROWS):
                multiply(
                    queries,
                    scores_address + 4 * r * KEY_TILE,
                    KEY_TILE,
                    queries_address + 4 * r * width,
                    width,
                    tile_keys,
                    KEY_TILE,
                    width,
                )
            begin = tile * KEY_TILE
            is_whole = begin + KEY_TILE - 1 <= start + first and (window <= 0 or begin > start + last - 1 - window)
            for r in range(num_rows):
                base = r * KEY_TILE
                if not is_whole:
                    position = start + first + r // group
                    seen_from = position - window + 1 - begin if window > 0 else np.int64(0)
                    seen_to = position - begin
                    for c in range(KEY_TILE):
                        value = load(scores, base + c)
                        is_seen = (c <= seen_to) & (c >= seen_from)
                        store(scores, base + c, value if is_seen else types.float32(_LOWEST))
                store(tile_peaks, r, largest(scores_address + 4 * base))
            # Loops over rows rather than one row after the other: each of these steps is a long chain of dependent
            # instructions, and only neighbouring rows can fill the waiting.
            for r in range(num_rows):
                before = load(peaks, r)
                peak = max(before, load(tile_peaks, r) * scaling)
                store(peaks, r, peak)
                store(corrections, r, exp(before - peak))
            for r in range(num_rows):
                base = r * KEY_TILE
                peak = load(peaks, r)
                added = types.float32(0.0)
                for c in range(KEY_TILE):
                    weight = exp(load(scores, base + c) * scaling - peak)
                    store(weights, base + c, weight)
                    added += weight
                store(weight_sum, r, load(weight_sum, r) * load(corrections, r) + added)
            for r in range(num_rows):
                correction = load(corrections, r)
                if correction != types.float32(1.0):
                    for i in range(dim):
                        store(total, r * dim + i, load(total, r * dim + i) * correction)
            for panel in range(0, dim, COLUMNS):
                for r in range(0, padded, ROWS):
                    multiply_add(
                        weights,
                        total_address + 4 * (r * dim + panel),
                        dim,
                        weights_address + 4 * r * tile_width,
                        tile_width,
                        tile_values + 4 * panel,
                        dim,
                        tile_width,
                    )
        for r in range(num_rows):
            inverse = types.float32(1.0) / load(weight_sum, r)
            base = ((first + r // group) * num_heads + kv_head * group + r % group) * dim
            for i in range(dim):
                store(out, base + i, load(total, r * dim + i) * inverse)


def _flash_f32(data):
    _flash(data, np.float32, False)


def _flash_bf16(data):
    _flash(data, np.uint16, True)


_CACHE: dict[str, tuple[int, int]] = {}


def _compiled(dtype: str) -> tuple[int, int]:
    if dtype not in _CACHE:
        pack_body, flash_body = {"float32": (_pack_f32, _flash_f32), "bfloat16": (_pack_bf16, _flash_bf16)}[dtype]
        _CACHE[dtype] = kernel(pack_body), kernel(flash_body)
    return _CACHE[dtype]


def pack(dtype: str) -> tuple[int, str]:
    """Lay out one context. Words: packed keys, packed values (each [K, tiles, 64, D] elements), K, D, S, elements from
    block to block of the pool, block table int32, first tile, number of tiles, context length, pool at this layer.
    """
    return _compiled(dtype)[0], "qqqqqqqqqqq"


def flash(dtype: str) -> tuple[int, str]:
    """Attend a chunk; D is a multiple of 64. Words: query [t, stride], out [t, H, D], t, position of the first token,
    H, K, D, query stride, first tile, number of tiles, window or 0, packed keys, packed values, scaling.
    """
    return _compiled(dtype)[1], "qqqqqqqqqqqqqd"
