"""The input of one forward pass: tokens of several sequences packed one after the other, without padding.

A sequence contributes a chunk: one token when it decodes, many when its prompt is computed. Its KV lives in the blocks
of its block table; place p is at offset p % S of block p // S. A token's place is its position in the text, less the
tokens before it that were dropped when its KV was handed over (`TokenSequence.num_dropped`). The model reads token ids
and positions, the attention backend the places. Built anew for every step, on the host with numpy, and copied to the
device in one go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The tokens of one sequence that a step computes.

    Attributes:
        token_ids: the chunk; at least one.
        start: place of its first token = tokens of this sequence that are in the pool already.
        block_ids: block table; covers at least ``start + len(token_ids)`` places. An int32 array is fastest.
        wants_logits: whether the logits of the chunk's last token are wanted.
        num_dropped: how much the position of its tokens is ahead of their place.
        num_window_queries: the queries of this many of its last tokens are wanted.
        scored: the tokens of the chunk, counted from its first, whose final hidden states are wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int] | NDArray[np.int32]
    wants_logits: bool = True
    num_dropped: int = 0
    num_window_queries: int = 0
    scored: range = range(0)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input; B sequences, T tokens, R wanted rows. All tensors are on the model's device.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T]; in the text, for the rotary embedding.
        places: int64 [T]; in the pool, for attention. The same tensor as `positions` when nothing was dropped.
        query_starts: int32 [B + 1]; sequence b owns rows ``query_starts[b]:query_starts[b + 1]``.
        context_lens: int32 [B]; tokens of the sequence in the pool after this step.
        block_tables: int32 [B, max blocks]; past a sequence's own blocks the entries are 0 and never read.
        slot_mapping: int64 [T]; block * S + offset where a token's K and V go.
        logits_rows: int64 [R]; rows of T whose logits are wanted, ascending.
        window_rows: int64 [W]; rows of T whose queries are wanted, in every layer.
        scored_rows: int64 [P]; rows of T whose final hidden states are wanted, to make logits of them piece by piece.
        query_lens: host copy, tokens per sequence.
        context_lens_host: host copy of `context_lens`.
        window_queries: filled by the model, when there are `window_rows`: per layer [W, H, D], as attention sees them.
        scored_states: filled by the model, when there are `scored_rows`: one tensor [P, hidden size].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    logits_rows: torch.Tensor
    window_rows: torch.Tensor
    scored_rows: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    window_queries: list[torch.Tensor] = field(default_factory=list)
    scored_states: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def only_logits(self) -> "ForwardBatch":
        """Return the batch cut down to the rows whose logits are wanted, as one decode per such sequence."""
        wanted = torch.isin(self.query_starts[1:].long() - 1, self.logits_rows)
        rows = torch.arange(self.logits_rows.shape[0], device=self.logits_rows.device)
        is_wanted = wanted.tolist()
        return ForwardBatch(
            token_ids=self.token_ids[self.logits_rows],
            positions=self.positions[self.logits_rows],
            places=self.places[self.logits_rows],
            query_starts=torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
            context_lens=self.context_lens[wanted],
            block_tables=self.block_tables[wanted],
            slot_mapping=self.slot_mapping[self.logits_rows],
            logits_rows=rows,
            window_rows=self.window_rows[:0],
            scored_rows=self.scored_rows[:0],
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
        places = np.array(context_lens, np.int64) - 1
        sequence_of_token = np.arange(len(chunks))
        query_starts = np.arange(len(chunks) + 1, dtype=np.int32)
    else:
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks])
        query_starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(query_lens, out=query_starts[1:])
        sequence_of_token = np.repeat(np.arange(len(chunks)), query_lens)
        first_place = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks)) - query_starts[:-1]
        places = np.arange(len(token_ids), dtype=np.int64) + first_place[sequence_of_token]
    block_tables = np.zeros((len(chunks), max(-(-length // block_size) for length in context_lens)), np.int32)
    for row, chunk, length in zip(block_tables, chunks, context_lens, strict=True):
        used = -(-length // block_size)
        row[:used] = chunk.block_ids[:used]
    dropped = np.fromiter((chunk.num_dropped for chunk in chunks), np.int64, len(chunks))
    blocks = block_tables[sequence_of_token, places // block_size].astype(np.int64)
    wanted = np.fromiter((chunk.wants_logits for chunk in chunks), np.bool_, len(chunks))
    arrays = (
        token_ids,
        places,
        query_starts,
        np.array(context_lens, np.int32),
        block_tables,
        blocks * block_size + places % block_size,
        query_starts[1:][wanted].astype(np.int64) - 1,
        _window_rows(chunks, query_starts),
        _scored_rows(chunks, query_starts),
    )
    tensors = (torch.from_numpy(array).to(device) for array in arrays)
    ids, at, starts, contexts, tables, slots, rows, window, scored = tensors
    positions = at + torch.from_numpy(dropped[sequence_of_token]).to(device) if dropped.any() else at
    return ForwardBatch(
        ids, positions, at, starts, contexts, tables, slots, rows, window, scored, query_lens, context_lens
    )


def _window_rows(chunks: Sequence[SequenceChunk], query_starts: NDArray[np.int32]) -> NDArray[np.int64]:
    wanted = [
        np.arange(stop - min(chunk.num_window_queries, len(chunk.token_ids)), stop, dtype=np.int64)
        for chunk, stop in zip(chunks, query_starts[1:].tolist(), strict=True)
        if chunk.num_window_queries
    ]
    return np.concatenate(wanted) if wanted else np.zeros(0, np.int64)


def _scored_rows(chunks: Sequence[SequenceChunk], query_starts: NDArray[np.int32]) -> NDArray[np.int64]:
    wanted = [
        np.arange(start + chunk.scored.start, start + chunk.scored.stop, dtype=np.int64)
        for chunk, start in zip(chunks, query_starts[:-1].tolist(), strict=True)
        if chunk.scored
    ]
    return np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
