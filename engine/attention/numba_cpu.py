"""The fast CPU backend: every sequence goes through the kernel that suits its number of query tokens.

1. `rows`: few query tokens (every decode): the paged kernel, one query token at a time, nothing gathered.
2. `tiles`: a chunk of a prompt: the flash kernel, where the machine has its instructions.
3. the same through `sdpa` on gathered keys and values, where it has not.
"""

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.sdpa import Chunk, attend_chunk, plan_chunk
from engine.forward import ForwardBatch
from engine.kernels import flash_attention, tile
from engine.kernels.flash_attention import KEY_TILE
from engine.kernels.paged_attention import paged_attention
from engine.kernels.team import Kernel
from engine.pool import KvPool

# Below either, laying out keys costs more than the products save (measured: 16 to 512 query tokens, contexts to 2,048).
_TILE_TOKENS = 8
_TILE_PRODUCTS = 4_096
_SDPA_TOKENS = 32


@dataclass(frozen=True, slots=True)
class NumbaPlan:
    """`rows`, `sequences`, `positions` int64 [n]: the query tokens for the paged kernel; `chunks`: the others.

    `blocks`: int32 block table of each chunk.
    """

    num_tokens: int
    num_threads: int
    rows: torch.Tensor
    sequences: torch.Tensor
    positions: torch.Tensor
    block_tables: torch.Tensor
    chunks: tuple[Chunk, ...]
    blocks: tuple[torch.Tensor, ...]


class NumbaAttention:
    """CPU backend for float32 and bfloat16.

    Concurrency: one step at a time per object.
    """

    name = "numba"

    def __init__(self, pool: KvPool) -> None:
        dtype = pool.layout.dtype
        self._pool = pool
        self._paged = Kernel(*paged_attention(dtype))
        self._has_tiles = tile.can_multiply(dtype) and pool.layout.head_dim % tile.COLUMNS == 0
        if self._has_tiles:
            self._pack = Kernel(*flash_attention.pack(dtype))
            self._flash = Kernel(*flash_attention.flash(dtype))

    def plan(self, batch: ForwardBatch) -> NumbaPlan:
        lengths = np.array(batch.query_lens)
        if self._has_tiles:
            is_chunk = (lengths >= _TILE_TOKENS) & (lengths * np.array(batch.context_lens_host) >= _TILE_PRODUCTS)
        else:
            is_chunk = lengths >= _SDPA_TOKENS
        sequences = np.repeat(np.arange(len(lengths)), lengths)
        rows = np.arange(len(sequences))
        positions = batch.places
        chunks: tuple[Chunk, ...] = ()
        blocks: tuple[torch.Tensor, ...] = ()
        if is_chunk.any():
            is_row = ~is_chunk[sequences]
            rows, sequences = rows[is_row], sequences[is_row]
            positions = positions[torch.from_numpy(is_row)]
            starts = np.cumsum(lengths) - lengths
            size = self._pool.layout.block_size
            indices = [int(i) for i in np.flatnonzero(is_chunk)]
            chunks = tuple(plan_chunk(batch, i, int(starts[i]), size) for i in indices)
            blocks = tuple(batch.block_tables[i] for i in indices)
        return NumbaPlan(
            batch.num_tokens,
            torch.get_num_threads(),
            torch.from_numpy(rows),
            torch.from_numpy(sequences),
            positions,
            batch.block_tables,
            chunks,
            blocks,
        )

    def attend(
        self, query: torch.Tensor, layer_idx: int, plan: NumbaPlan, *, scaling: float, window: int
    ) -> torch.Tensor:
        out = torch.empty((plan.num_tokens, query.shape[1] * query.shape[2]), dtype=query.dtype)
        for chunk, blocks in zip(plan.chunks, plan.blocks, strict=True):
            if self._has_tiles:
                part = query[chunk.rows], out[chunk.rows]
                self._attend_tiles(*part, layer_idx, chunk, blocks, plan.num_threads, scaling, window)
            else:
                out[chunk.rows] = attend_chunk(self._pool, query[chunk.rows], layer_idx, chunk, scaling, window)
        if plan.rows.shape[0]:
            self._attend_rows(query, out, layer_idx, plan, scaling, window)
        return out

    def _attend_rows(
        self, query: torch.Tensor, out: torch.Tensor, layer_idx: int, plan: NumbaPlan, scaling: float, window: int
    ) -> None:
        layout = self._pool.layout
        self._paged.run(
            plan.num_threads,
            query.data_ptr(),
            out.data_ptr(),
            plan.rows.shape[0],
            query.shape[1],
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_size,
            self._pool.kv.stride(0),
            plan.block_tables.shape[1],
            query.stride(0),
            self._layer_ptr(layer_idx),
            plan.block_tables.data_ptr(),
            plan.rows.data_ptr(),
            plan.sequences.data_ptr(),
            plan.positions.data_ptr(),
            window,
            scaling,
        )

    def _attend_tiles(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        layer_idx: int,
        chunk: Chunk,
        blocks: torch.Tensor,
        num_threads: int,
        scaling: float,
        window: int,
    ) -> None:
        layout = self._pool.layout
        first_tile = max(0, chunk.start - window + 1) // KEY_TILE if window else 0
        num_tiles = -(-chunk.context_len // KEY_TILE) - first_tile
        packed = torch.empty((2, layout.num_kv_heads, num_tiles, KEY_TILE, layout.head_dim), dtype=query.dtype)
        keys, values = packed[0].data_ptr(), packed[1].data_ptr()
        self._pack.run(
            num_threads,
            keys,
            values,
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_size,
            self._pool.kv.stride(0),
            blocks.data_ptr(),
            first_tile,
            num_tiles,
            chunk.context_len,
            self._layer_ptr(layer_idx),
        )
        self._flash.run(
            num_threads,
            query.data_ptr(),
            out.data_ptr(),
            query.shape[0],
            chunk.start,
            query.shape[1],
            layout.num_kv_heads,
            layout.head_dim,
            query.stride(0),
            first_tile,
            num_tiles,
            window,
            keys,
            values,
            scaling,
        )

    def _layer_ptr(self, layer_idx: int) -> int:
        kv = self._pool.kv
        return kv.data_ptr() + layer_idx * kv.stride(1) * kv.element_size()
