"""Every attention backend against a naive reference, over random block tables and ragged chunks."""

import random

import pytest
import torch

from core.errors import ConfigError
from core.layout import KvLayout
from engine.attention.base import write_tokens
from engine.attention.select import make_attention
from engine.config import AttentionName
from engine.forward import SequenceChunk, build_batch
from engine.pool import TORCH_DTYPES, KvPool

NUM_LAYERS = 2
# Against a float32 reference over the same (rounded) inputs: float32 differs by the order of sums, bfloat16 by the
# rounding of the result (values are of order 1, its unit in the last place is 2**-8).
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

# (start, length) of each sequence's chunk
BATCHES = {
    "one decode": [(79, 1)],
    "decodes of ragged lengths": [(0, 1), (5, 1), (16, 1), (31, 1), (200, 1), (15, 1)],
    "first chunks": [(0, 3), (0, 16), (0, 40)],
    "later chunks at block borders": [(16, 16), (32, 33), (7, 9), (15, 2)],
    "mixed": [(100, 1), (0, 50), (33, 1), (64, 40), (3, 2)],
    "long chunk": [(130, 70)],
    "chunks of several query tiles": [(0, 300), (190, 110)],
}


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int) -> torch.Tensor:
    """query [t, H, D], keys and values [n, K, D], all float64 -> [t, H * D]."""
    group = query.shape[1] // keys.shape[1]
    rows = []
    for t in range(query.shape[0]):
        last = start + t + 1
        first = max(0, last - window) if window else 0
        heads = []
        for h in range(query.shape[1]):
            scores = keys[first:last, h // group] @ query[t, h] / query.shape[2] ** 0.5
            heads.append(torch.softmax(scores, 0) @ values[first:last, h // group])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["sdpa", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 20], ids=["full", "window"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 32), (4, 1, 80), (2, 1, 128)], ids=["mha", "gqa", "mqa", "wide"])
@pytest.mark.parametrize("case", BATCHES)
def test_equals_the_naive_reference(
    backend: AttentionName, dtype: str, window: int, heads: tuple[int, int, int], case: str
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    chunks = BATCHES[case]
    block_size = 16
    generator = torch.Generator().manual_seed(7)
    shuffled = random.Random(7)
    needed = [-(-(start + length) // block_size) for start, length in chunks]
    pool = KvPool(KvLayout("w", NUM_LAYERS, num_kv_heads, head_dim, dtype, block_size), sum(needed) + 3)
    pool.kv.normal_(generator=generator)  # whatever other sequences left there must not be seen
    free = list(range(pool.num_blocks))
    shuffled.shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in needed]
    contexts = [torch.randn((start + n, 2, num_kv_heads, head_dim), generator=generator) for start, n in chunks]
    contexts = [context.to(TORCH_DTYPES[dtype]) for context in contexts]
    layer = 1
    for table, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([table[t // block_size] * block_size + t % block_size for t in range(len(context))])
        write_tokens(pool, layer, slots, context[:, 0], context[:, 1])
    batch = build_batch(
        [SequenceChunk([0] * n, start, table) for (start, n), table in zip(chunks, tables, strict=True)], block_size
    )
    # Strided rows, as the fused layers hand them over: queries next to keys and values.
    qkv = torch.randn((batch.num_tokens, num_heads + 2 * num_kv_heads, head_dim), generator=generator)
    query = qkv.to(TORCH_DTYPES[dtype])[:, :num_heads]

    attention = make_attention(backend, pool)
    got = attention.attend(query, layer, attention.plan(batch), scaling=head_dim**-0.5, window=window)

    row = 0
    for (start, n), context in zip(chunks, contexts, strict=True):
        keys, values = context.double().unbind(1)
        want = naive(query[row : row + n].double(), keys, values, start, window)
        torch.testing.assert_close(got[row : row + n].double(), want, atol=TOLERANCE[dtype], rtol=0)
        row += n


def test_several_threads_compute_what_one_computes() -> None:
    pool = KvPool(KvLayout("w", 1, 2, 64, "float32", 16), 64)
    pool.kv.normal_(generator=torch.Generator().manual_seed(0))
    tables = [list(range(b * 8, b * 8 + 8)) for b in range(8)]
    batch = build_batch([SequenceChunk([0], 120 - b, table) for b, table in enumerate(tables)], 16)
    query = torch.randn((8, 4, 64), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            attention = make_attention("numba", pool)
            results.append(attention.attend(query, 0, attention.plan(batch), scaling=0.125, window=0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_numba_is_refused_on_another_device() -> None:
    pool = KvPool(KvLayout("w", 1, 2, 64, "float32", 16), 2, device="meta")
    with pytest.raises(ConfigError, match="attention_backend: numba needs device cpu"):
        make_attention("numba", pool)
    assert make_attention("auto", pool).name == "sdpa"
