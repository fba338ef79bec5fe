"""Runs what the scheduler planned: packs the batch, computes it, samples, tells observers which KV is ready.

Knows the model and the sampler; moves no request on. What constraints allow is worked out elsewhere while the model
computes; it is awaited here, for a bounded time, before a token is chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from core.clock import Clock
from core.ids import RequestId
from engine.contract import PrefillObserver, Runner
from engine.forward import ForwardBatch, SequenceChunk, build_batch
from engine.prompt_scores import PromptScores, details_of
from engine.sampler import Choices, Sampler
from engine.sequence import TokenSequence
from grammar.walk import await_answers

Shares = Sequence[tuple[TokenSequence, int]]
Observers = Mapping[RequestId, PrefillObserver]


class Executor:
    """One forward pass and one sampling per call."""

    def __init__(
        self, runner: Runner, clock: Clock, *, layer_group_size: int, score_window: int = 0, mask_wait_s: float = 0.05
    ) -> None:
        """
        Args:
            score_window: keep the queries of this many last prompt tokens of every prefill for a hand-off.
            mask_wait_s: what constraints allow is awaited so long, then the step goes on without those rows.
        """
        self._clock = clock
        self._mask_wait_s = mask_wait_s
        self._runner = runner
        self._layout = runner.pool.layout
        self._device = runner.pool.kv.device
        self._layer_group_size = layer_group_size
        self._score_window = score_window
        self._sampler = Sampler(runner.info.vocab_size, self._device)

    def compute(self, shares: Shares, observers: Observers) -> Choices:
        """Compute each sequence's share.

        Returns:
            A token for each sequence that is computed to its end by this step, in the order of `shares`.
        """
        chunks = []
        complete = []
        windows: list[tuple[TokenSequence, int]] = []
        scored: list[tuple[PromptScores, range]] = []
        for sequence, share in shares:
            start = sequence.num_computed
            end = start + share
            is_complete = end == len(sequence.tokens)
            wants_window = is_complete and self._score_window if sequence.is_prefill else 0
            positions = sequence.scores.missing(start, end) if sequence.scores is not None else range(0)
            chunks.append(
                SequenceChunk(
                    sequence.tokens[start:end],
                    start - sequence.num_dropped,
                    sequence.block_table,
                    is_complete,
                    sequence.num_dropped,
                    wants_window,
                    range(positions.start - start, positions.stop - start),
                )
            )
            if is_complete:
                complete.append(sequence)
            if wants_window:
                windows.append((sequence, min(share, wants_window)))
            if sequence.scores is not None and positions:
                scored.append((sequence.scores, positions))
        batch = build_batch(chunks, self._layout.block_size, self._device)
        with torch.inference_mode():
            logits = self._runner.forward(batch, self._layer_hook(shares, observers))
            self._keep_windows(batch, windows)
            self._score(batch, scored)
            return self._choose(logits, complete) if complete else Choices([], {})

    def _choose(self, logits: torch.Tensor, sequences: Sequence[TokenSequence]) -> Choices:
        states = [sequence.sampling for sequence in sequences]
        walks = {row: walk for row, sequence in enumerate(sequences) if (walk := sequence.walk) is not None}
        if not walks:
            return self._sampler.choose(logits, states)
        await_answers(walks.values(), self._mask_wait_s, self._clock)
        unknown = frozenset(row for row, walk in walks.items() if not walk.can_choose)
        for row in unknown:
            walks[row].must_wait = not walks[row].is_ready
        masks = {row: walk.mask for row, walk in walks.items() if row not in unknown and walk.mask is not None}
        return replace(self._sampler.choose(logits, states, masks), unknown=unknown)

    def _score(self, batch: ForwardBatch, scored: Sequence[tuple[PromptScores, range]]) -> None:
        if not scored:
            return
        (states,) = batch.scored_states
        token_ids = [token_id for scores, positions in scored for token_id in scores.following(positions)]
        counts = [scores.num_top for scores, positions in scored for _ in positions]
        details = details_of(states, self._runner.logits, token_ids, counts, self._runner.info.vocab_size)
        at = 0
        for scores, positions in scored:
            scores.add(details[at : at + len(positions)])
            at += len(positions)

    def _keep_windows(self, batch: ForwardBatch, windows: Sequence[tuple[TokenSequence, int]]) -> None:
        if not batch.window_queries:
            return
        queries = torch.stack(batch.window_queries)  # [L, W of all, H, D]
        at = 0
        for sequence, width in windows:
            sequence.window_queries = queries[:, at : at + width]
            at += width

    def _layer_hook(self, shares: Shares, observers: Observers) -> Callable[[int], None] | None:
        """Return what tells the observers of this step's prefills; None when there are none."""
        if not observers:
            return None
        watched = [
            (observer, sequence.request_id, range(sequence.num_computed, sequence.num_computed + share))
            for sequence, share in shares
            if (observer := observers.get(sequence.request_id)) is not None
        ]
        if not watched:
            return None
        size, num_layers = self._layer_group_size, self._layout.num_layers

        def on_layer(layer_idx: int) -> None:
            if (layer_idx + 1) % size == 0 or layer_idx + 1 == num_layers:
                layers = range(layer_idx // size * size, layer_idx + 1)
                for observer, request_id, tokens in watched:
                    observer.on_kv_ready(request_id, layers, tokens)

        return on_layer
