"""Frames read from and written to the pool, and the batches that address it."""

import pytest
import torch

from core.errors import ConfigError
from core.layout import KvLayout
from engine.attention.base import write_tokens
from engine.forward import SequenceChunk, build_batch
from engine.pool import KvPool

BLOCKS = torch.tensor([5, 0, 7, 2])


def make_pool(block_size: int = 8, dtype: str = "float32") -> KvPool:
    return KvPool(KvLayout("w", 3, 2, 4, dtype, block_size), 9)


@pytest.mark.parametrize("tokens", [range(32), range(8, 24), range(3, 6), range(5, 30), range(31, 32), range(7, 9)])
@pytest.mark.parametrize("layers", [range(3), range(1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frame_comes_back_and_touches_nothing_else(tokens: range, layers: range, dtype: str) -> None:
    pool = make_pool(dtype=dtype)
    pool.kv.normal_(generator=torch.Generator().manual_seed(0))
    before = pool.kv.clone()
    frame = torch.randn(pool.frame_shape(layers, tokens)).to(pool.kv.dtype)
    pool.write(BLOCKS, layers, tokens, frame)
    assert torch.equal(pool.read(BLOCKS, layers, tokens), frame)
    out = torch.empty_like(frame)
    assert pool.read(BLOCKS, layers, tokens, out) is out
    assert torch.equal(out, frame)
    for layer in range(3):
        for position in range(32):
            block, offset = int(BLOCKS[position // 8]), position % 8
            cell = pool.kv[block, layer, :, :, offset]
            if layer in layers and position in tokens:
                assert torch.equal(cell, frame[layer - layers.start, :, :, position - tokens.start])
                before[block, layer, :, :, offset] = cell
    assert torch.equal(pool.kv, before)


def test_pools_of_other_block_sizes_exchange_frames() -> None:
    small, large = make_pool(4), make_pool(16)
    frame = torch.randn(small.frame_shape(range(3), range(13)))
    small.write(BLOCKS, range(3), range(13), frame)
    large.write(torch.tensor([3]), range(3), range(13), small.read(BLOCKS, range(3), range(13)))
    assert torch.equal(large.read(torch.tensor([3]), range(3), range(13)), frame)


@pytest.mark.parametrize("tokens", [range(64), range(5, 50)])
def test_a_frame_with_large_blocks_lands_as_one_with_small_ones(tokens: range) -> None:
    layout = KvLayout("w", 16, 4, 64, "bfloat16", 16)  # a block of 256 KiB: copied block by block
    pool, other = KvPool(layout, 9), KvPool(layout, 9)
    frame = torch.randn(pool.frame_shape(range(16), tokens)).to(torch.bfloat16)
    pool.write(BLOCKS, range(16), tokens, frame)
    for layer in range(16):
        other.write(BLOCKS, range(layer, layer + 1), tokens, frame[layer : layer + 1].clone())
    assert torch.equal(pool.kv, other.kv)
    assert torch.equal(pool.read(BLOCKS, range(16), tokens), frame)


def test_tokens_written_by_slot_are_read_by_position() -> None:
    pool = make_pool()
    batch = build_batch([SequenceChunk([0] * 11, 4, BLOCKS.tolist())], 8)
    keys, values = torch.randn(2, 11, 2, 4).unbind(0)
    write_tokens(pool, 1, batch.slot_mapping, keys, values)
    frame = pool.read(BLOCKS, range(1, 2), range(4, 15))
    assert torch.equal(frame[0, 0], keys.transpose(0, 1))
    assert torch.equal(frame[0, 1], values.transpose(0, 1))


def test_a_frame_of_another_shape_or_dtype_is_refused() -> None:
    pool = make_pool()
    for frame in (torch.zeros(3, 2, 2, 5, 4), torch.zeros(pool.frame_shape(range(3), range(4)), dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected torch\.float32"):
            pool.write(BLOCKS, range(3), range(4), frame)
    assert pool.kv.abs().sum() == 0


def test_a_pool_larger_than_memory_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        KvPool(KvLayout("w", 100, 100, 128, "float32", 256), 2**40)


def test_batch_of_ragged_chunks() -> None:
    chunks = [
        SequenceChunk([11, 12, 13], 7, [4, 1], wants_logits=False),
        SequenceChunk([21], 16, [3, 0, 6]),
        SequenceChunk([31, 32], 0, [8]),
    ]
    batch = build_batch(chunks, 8)
    assert batch.token_ids.tolist() == [11, 12, 13, 21, 31, 32]
    assert batch.positions.tolist() == [7, 8, 9, 16, 0, 1]
    assert batch.query_starts.tolist() == [0, 3, 4, 6]
    assert batch.context_lens.tolist() == [10, 17, 2] == list(batch.context_lens_host)
    assert batch.block_tables.tolist() == [[4, 1, 0], [3, 0, 6], [8, 0, 0]]
    assert batch.slot_mapping.tolist() == [4 * 8 + 7, 8, 9, 6 * 8, 64, 65]
    assert batch.logits_rows.tolist() == [3, 5]
    only = batch.only_logits()
    assert only.token_ids.tolist() == [21, 32]
    assert only.positions.tolist() == [16, 1]
    assert only.query_lens == (1, 1)
    assert only.context_lens_host == (17, 2)
    assert only.block_tables.tolist() == [[3, 0, 6], [8, 0, 0]]
    assert only.slot_mapping.tolist() == [48, 65]
    assert only.logits_rows.tolist() == [0, 1]


def test_batch_of_decodes_equals_the_general_case() -> None:
    tables = [[4, 1], [3, 0, 6]]
    decodes = [SequenceChunk([5], 9, tables[0]), SequenceChunk([6], 16, tables[1])]
    batch = build_batch(decodes, 8)
    general = build_batch([*decodes, SequenceChunk([1, 2], 0, [7])], 8)
    for name in ("token_ids", "positions", "slot_mapping"):
        assert getattr(batch, name).tolist() == getattr(general, name)[:2].tolist(), name
    assert batch.query_starts.tolist() == [0, 1, 2]
    assert batch.logits_rows.tolist() == [0, 1]
