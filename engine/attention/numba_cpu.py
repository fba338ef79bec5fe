"""The fast CPU backend: short queries through the fused paged kernel, long prompt chunks through `sdpa`.

The kernel reads the pool in place; it wins wherever a sequence brings few query tokens, that is for every decode. A
long chunk reuses each key for many queries, where torch's blocked matrix products win in spite of the gather.
"""

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.sdpa import Chunk, attend_chunk, plan_chunk
from engine.forward import ForwardBatch
from engine.kernels.paged_attention import paged_attention
from engine.kernels.team import Kernel
from engine.pool import KvPool

_CHUNK_TOKENS = 32  # from here on sdpa is faster (measured with contexts of 64 to 2,048)


@dataclass(frozen=True, slots=True)
class NumbaPlan:
    """`rows`, `sequences`, `positions` int64 [n]: the query tokens for the kernel; `chunks`: the others."""

    num_tokens: int
    rows: torch.Tensor
    sequences: torch.Tensor
    positions: torch.Tensor
    block_tables: torch.Tensor
    chunks: tuple[Chunk, ...]


class NumbaAttention:
    """CPU backend for float32 and bfloat16.

    Concurrency: one step at a time per object.
    """

    name = "numba"

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._kernel = Kernel(*paged_attention(pool.layout.dtype))
        self._threads = torch.get_num_threads()

    def plan(self, batch: ForwardBatch) -> NumbaPlan:
        lengths = np.array(batch.query_lens)
        sequences = np.repeat(np.arange(len(lengths)), lengths)
        rows = np.arange(len(sequences))
        positions = batch.positions
        chunks: tuple[Chunk, ...] = ()
        if lengths.max() >= _CHUNK_TOKENS:
            short = (lengths < _CHUNK_TOKENS)[sequences]
            rows, sequences = rows[short], sequences[short]
            positions = positions[torch.from_numpy(short)]
            starts = np.cumsum(lengths) - lengths
            size = self._pool.layout.block_size
            chunks = tuple(
                plan_chunk(batch, int(i), int(starts[i]), size) for i in np.flatnonzero(lengths >= _CHUNK_TOKENS)
            )
        return NumbaPlan(
            batch.num_tokens,
            torch.from_numpy(rows),
            torch.from_numpy(sequences),
            positions,
            batch.block_tables,
            chunks,
        )

    def attend(
        self, query: torch.Tensor, layer_idx: int, plan: NumbaPlan, *, scaling: float, window: int
    ) -> torch.Tensor:
        num_heads, head_dim = query.shape[1:]
        out = torch.empty((plan.num_tokens, num_heads * head_dim), dtype=query.dtype)
        for chunk in plan.chunks:
            out[chunk.rows] = attend_chunk(self._pool, query[chunk.rows], layer_idx, chunk, scaling, window)
        if plan.rows.shape[0]:
            layout, pool = self._pool.layout, self._pool.kv
            self._kernel.run(
                self._threads,
                query.data_ptr(),
                out.data_ptr(),
                plan.rows.shape[0],
                num_heads,
                layout.num_kv_heads,
                head_dim,
                layout.block_size,
                pool.stride(0),
                plan.block_tables.shape[1],
                query.stride(0),
                pool.data_ptr() + layer_idx * pool.stride(1) * pool.element_size(),
                plan.block_tables.data_ptr(),
                plan.rows.data_ptr(),
                plan.sequences.data_ptr(),
                plan.positions.data_ptr(),
                window,
                scaling,
            )
        return out
