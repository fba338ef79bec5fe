"""The device-agnostic backend: gathered keys and values through `scaled_dot_product_attention`.

Prompt chunks are computed one sequence at a time, so they need no padding. Decoding sequences are batched by length:
a bucket never pads a member to more than a quarter beyond its own blocks (and a bucket of short ones to 8 blocks).
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.forward import ForwardBatch
from engine.pool import KvPool

_FREE_BLOCKS = 8  # contexts up to this many blocks share a bucket whatever their length
_MAX_PADDING = 1.25


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with several query tokens: `rows` of the packed batch, the first at position `start` of its context;
    `blocks` int64 of the context."""

    rows: slice
    start: int
    context_len: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class Bucket:
    """Decoding sequences of similar length: rows int64 [b], blocks int64 [b, n], positions int64 [b, 1]."""

    rows: torch.Tensor
    blocks: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class SdpaPlan:
    num_tokens: int
    chunks: tuple[Chunk, ...]
    buckets: tuple[Bucket, ...]


class SdpaAttention:
    """Reference backend on any device."""

    name = "sdpa"

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool

    def plan(self, batch: ForwardBatch) -> SdpaPlan:
        size = self._pool.layout.block_size
        blocks_of = [-(-length // size) for length in batch.context_lens_host]
        rows, chunks, decodes = 0, [], []
        for sequence, length in enumerate(batch.query_lens):
            if length == 1:
                decodes.append((blocks_of[sequence], sequence, rows))
            else:
                chunks.append(plan_chunk(batch, sequence, rows, size))
            rows += length
        buckets: list[list[tuple[int, int, int]]] = []
        for entry in sorted(decodes, reverse=True):  # longest first: the first of a bucket sets its width
            if buckets and buckets[-1][0][0] <= max(_FREE_BLOCKS, entry[0] * _MAX_PADDING):
                buckets[-1].append(entry)
            else:
                buckets.append([entry])
        return SdpaPlan(rows, tuple(chunks), tuple(_plan_bucket(batch, bucket) for bucket in buckets))

    def attend(
        self, query: torch.Tensor, layer_idx: int, plan: SdpaPlan, *, scaling: float, window: int
    ) -> torch.Tensor:
        out = torch.empty((plan.num_tokens, query.shape[1] * query.shape[2]), dtype=query.dtype, device=query.device)
        for chunk in plan.chunks:
            out[chunk.rows] = attend_chunk(self._pool, query[chunk.rows], layer_idx, chunk, scaling, window)
        for bucket in plan.buckets:
            out[bucket.rows] = self._attend_bucket(query[bucket.rows], layer_idx, bucket, scaling, window)
        return out

    def _attend_bucket(
        self, query: torch.Tensor, layer_idx: int, bucket: Bucket, scaling: float, window: int
    ) -> torch.Tensor:
        keys, values = (_contexts(part, bucket.blocks) for part in self._pool.layer(layer_idx))  # [b, K, n * S, D]
        num_rows, num_kv_heads, length, head_dim = keys.shape
        grouped = query.view(num_rows, num_kv_heads, -1, head_dim)  # the G heads of a kv head as G query rows
        at = torch.arange(length, device=query.device)
        seen = at <= bucket.positions
        if window:
            seen &= at > bucket.positions - window
        mask = seen[:, None, None]
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling).reshape(num_rows, -1)


def plan_chunk(batch: ForwardBatch, sequence: int, first_row: int, block_size: int) -> Chunk:
    """Describe one sequence of several query tokens."""
    length = batch.context_lens_host[sequence]
    blocks = batch.block_tables[sequence, : -(-length // block_size)].long()
    rows = batch.query_lens[sequence]
    return Chunk(slice(first_row, first_row + rows), length - rows, length, blocks)


def attend_chunk(
    pool: KvPool, query: torch.Tensor, layer_idx: int, chunk: Chunk, scaling: float, window: int
) -> torch.Tensor:
    """Attention of one sequence's chunk: query [t, H, D] -> [t, H * D]."""
    first = 0  # leading positions that no query of the chunk sees are not read
    if window:
        first = max(0, chunk.start - window + 1) // pool.layout.block_size
    offset = first * pool.layout.block_size
    length = chunk.context_len - offset
    keys, values = (_contexts(part, chunk.blocks[None, first:])[:, :, :length] for part in pool.layer(layer_idx))
    start = chunk.start - offset
    mask = None
    if start or (window and window < length):
        at = torch.arange(length, device=query.device)
        own = at[start:, None]
        mask = at <= own
        if window:
            mask &= at > own - window
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return attended[0].transpose(0, 1).reshape(query.shape[0], -1)


def _contexts(layer: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Gather [N, K, S, D] by block ids [b, n] into [b, K, n * S, D]."""
    gathered = layer[blocks]  # [b, n, K, S, D]
    return gathered.transpose(1, 2).reshape(blocks.shape[0], layer.shape[1], -1, layer.shape[3])


def _plan_bucket(batch: ForwardBatch, bucket: list[tuple[int, int, int]]) -> Bucket:
    width = bucket[0][0]
    device = batch.places.device
    sequences = torch.tensor([sequence for _, sequence, _ in bucket], device=device)
    rows = torch.tensor([row for _, _, row in bucket], device=device)
    return Bucket(rows, batch.block_tables[sequences, :width].long(), batch.places[rows, None])
