"""The input of one forward pass: tokens of several sequences packed one after the other, without padding.

A sequence contributes a chunk: one token when it decodes, many when its prompt is computed. Its KV lives in the blocks
of its block table; position p is at offset p % S of block p // S. The model reads token ids and positions, the
attention backend the rest. Built anew for every step, on the host with numpy, and copied to the device in one go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The tokens of one sequence that a step computes.

    Attributes:
        token_ids: the chunk; at least one.
        start: position of its first token = tokens of this sequence that are in the pool already.
        block_ids: block table; covers at least ``start + len(token_ids)`` positions. An int32 array is fastest.
        wants_logits: whether the logits of the chunk's last token are wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int] | NDArray[np.int32]
    wants_logits: bool = True


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input; B sequences, T tokens, R wanted rows. All tensors are on the model's device.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T].
        query_starts: int32 [B + 1]; sequence b owns rows ``query_starts[b]:query_starts[b + 1]``.
        context_lens: int32 [B]; tokens of the sequence in the pool after this step.
        block_tables: int32 [B, max blocks]; past a sequence's own blocks the entries are 0 and never read.
        slot_mapping: int64 [T]; block * S + offset where a token's K and V go.
        logits_rows: int64 [R]; rows of T whose logits are wanted, ascending.
        query_lens: host copy, tokens per sequence.
        context_lens_host: host copy of `context_lens`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    logits_rows: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens)

    def only_logits(self) -> "ForwardBatch":
        """Return the batch cut down to the rows whose logits are wanted, as one decode per such sequence."""
        wanted = torch.isin(self.query_starts[1:].long() - 1, self.logits_rows)
        rows = torch.arange(self.logits_rows.shape[0], device=self.logits_rows.device)
        is_wanted = wanted.tolist()
        return ForwardBatch(
            token_ids=self.token_ids[self.logits_rows],
            positions=self.positions[self.logits_rows],
            query_starts=torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
            context_lens=self.context_lens[wanted],
            block_tables=self.block_tables[wanted],
            slot_mapping=self.slot_mapping[self.logits_rows],
            logits_rows=rows,
            query_lens=(1,) * len(rows),
            context_lens_host=tuple(n for n, keep in zip(self.context_lens_host, is_wanted, strict=True) if keep),
        )


def build_batch(chunks: Sequence[SequenceChunk], block_size: int, device: torch.device | str = "cpu") -> ForwardBatch:
    """Pack `chunks` in their order. Logits rows follow the order of the chunks that want them.

    Args:
        block_size: S of the pool.
        device: where the model lives.
    """
    query_lens = tuple(len(chunk.token_ids) for chunk in chunks)
    assert min(query_lens, default=0) > 0, "every chunk brings at least one token"
    context_lens = tuple(chunk.start + length for chunk, length in zip(chunks, query_lens, strict=True))
    if max(query_lens) == 1:  # pure decode: no ragged arithmetic
        token_ids = np.fromiter((chunk.token_ids[0] for chunk in chunks), np.int64, len(chunks))
        positions = np.array(context_lens, np.int64) - 1
        sequence_of_token = np.arange(len(chunks))
        query_starts = np.arange(len(chunks) + 1, dtype=np.int32)
    else:
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks])
        query_starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(query_lens, out=query_starts[1:])
        sequence_of_token = np.repeat(np.arange(len(chunks)), query_lens)
        first_position = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks)) - query_starts[:-1]
        positions = np.arange(len(token_ids), dtype=np.int64) + first_position[sequence_of_token]
    block_tables = np.zeros((len(chunks), max(-(-length // block_size) for length in context_lens)), np.int32)
    for row, chunk, length in zip(block_tables, chunks, context_lens, strict=True):
        used = -(-length // block_size)
        row[:used] = chunk.block_ids[:used]
    blocks = block_tables[sequence_of_token, positions // block_size].astype(np.int64)
    wanted = np.fromiter((chunk.wants_logits for chunk in chunks), np.bool_, len(chunks))
    arrays = (
        token_ids,
        positions,
        query_starts,
        np.array(context_lens, np.int32),
        block_tables,
        blocks * block_size + positions % block_size,
        query_starts[1:][wanted].astype(np.int64) - 1,
    )
    ids, at, starts, contexts, tables, slots, rows = (torch.from_numpy(array).to(device) for array in arrays)
    return ForwardBatch(ids, at, starts, contexts, tables, slots, rows, query_lens, context_lens)
