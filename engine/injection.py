"""KV injection: what a model says when the keys and values of its prompt are replaced.

1. `refer` prefills prompts, takes out their KV (the canonical tensor ``[L, 2, K, T, D]``), continues them greedily, and
   asks for the logits of that continuation in one forward over the KV itself: the reference.
2. `inject` puts other KV in the prompt's place (what a codec made of it) and asks the same question.

The first token of a continuation comes from the prefill, as in serving, where it never depends on the transfer; its KV
and those of all later tokens are the model's own. Both questions are one prompt per forward, of equal shape: equal KV
give equal bits, whatever else was asked before. Knows nothing of codecs, and judges nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import ModelInfo, read_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.forward import SequenceChunk
from engine.runner import ModelRunner
from engine.token_scores import score_tokens

PREFILL_TOKENS = 512  # per step, as the engine computes by default
SCORE_WINDOW = 32  # last prompt tokens whose attention scores the others


@dataclass(frozen=True, slots=True)
class Reference:
    """One prompt with its own KV.

    Attributes:
        prompt: token ids.
        kv: [L, 2, K, T, D], of the model's dtype; on the host.
        continuation: greedy token ids, up to and including an end-of-sequence token.
        logits: float32 [continuation - 1, V]; row i is what follows ``continuation[: i + 1]``.
        scores: float32 [T], how much each prompt token matters to the last ones (`engine.token_scores`).
    """

    prompt: tuple[int, ...]
    kv: Tensor
    continuation: tuple[int, ...]
    logits: Tensor
    scores: Tensor


class InjectionHarness:
    """A loaded model whose pool nobody else uses.

    Concurrency: one call at a time, always from one thread (the first call decides which).
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._size = runner.pool.layout.block_size

    @classmethod
    def load(cls, path: Path, *, num_threads: int = 1, kv_cache_bytes: int | None = None) -> "InjectionHarness":
        """Load a checkpoint.

        Raises:
            ConfigError: it cannot be served by this engine.
        """
        config = EngineConfig(num_threads=num_threads, kv_cache_bytes=kv_cache_bytes, prefix_cache=False)
        return cls(ModelRunner.load(ModelConfig(path=path), config))

    @property
    def info(self) -> ModelInfo:
        return self._runner.info

    @torch.inference_mode()
    def refer(self, prompts: Sequence[Sequence[int]], num_continued: int) -> list[Reference]:
        """Return the references of `prompts`, in their order; those that end with their first token are left out.

        Args:
            prompts: token ids; each with its continuation fits the pool and the model's length.
            num_continued: tokens of a continuation that no end-of-sequence token ends; at least 2.
        """
        assert num_continued >= 2, "one token gives no position to compare"
        references: list[Reference] = []
        for group in self._groups(prompts, num_continued):
            tables = self._tables([len(prompt) + num_continued for prompt in group])
            prefilled = [self._prefill(prompt, table) for prompt, table in zip(group, tables, strict=True)]
            kvs, firsts, scores = zip(*prefilled, strict=True)
            continued = self._continue(group, tables, list(firsts), num_continued)
            for prompt, kv, score, continuation in zip(group, kvs, scores, continued, strict=True):
                if len(continuation) >= 2:
                    logits = self._ask(prompt, kv, continuation)
                    references.append(Reference(tuple(prompt), kv, continuation, logits, score))
        return references

    @torch.inference_mode()
    def inject(self, reference: Reference, kv: Tensor) -> Tensor:
        """Return the logits of the reference's continuation, teacher-forced, over `kv` in place of the prompt's own.

        Args:
            kv: shaped and typed as `reference.kv`; with fewer tokens, the missing ones were left out of it.
        """
        return self._ask(reference.prompt, kv, reference.continuation)

    def _ask(self, prompt: Sequence[int], kv: Tensor, continuation: Sequence[int]) -> Tensor:
        """One forward of ``continuation[:-1]`` over `kv`; the KV of the tokens themselves are computed."""
        start, inputs = kv.shape[3], continuation[:-1]
        table = self._tables([start + len(inputs)])[0]
        pool = self._runner.pool
        ids = torch.tensor(table, device=pool.kv.device)
        pool.write(ids, range(pool.layout.num_layers), range(start), kv.to(pool.kv.device))
        batch = self._runner.batch([SequenceChunk(inputs, start, table, num_dropped=len(prompt) - start)])
        every_row = torch.arange(len(inputs), device=pool.kv.device)
        return self._runner.forward(replace(batch, logits_rows=every_row)).cpu()

    def _prefill(self, prompt: Sequence[int], table: list[int]) -> tuple[Tensor, int, Tensor]:
        """Return the canonical KV of the prompt, the greedy first token and the scores of the prompt's."""
        logits = torch.empty(0)
        queries: list[Tensor] = []
        for start in range(0, len(prompt), PREFILL_TOKENS):
            tokens = prompt[start : start + PREFILL_TOKENS]
            batch = self._runner.batch([SequenceChunk(tokens, start, table, num_window_queries=SCORE_WINDOW)])
            logits = self._runner.forward(batch)
            queries = batch.window_queries
        pool = self._runner.pool
        ids = torch.tensor(table, device=pool.kv.device)
        kv = pool.read(ids, range(pool.layout.num_layers), range(len(prompt)))
        scores = score_tokens((queries[at], kv[at, 0]) for at in range(len(queries)))
        return kv.cpu(), int(logits[-1].argmax()), scores.cpu()

    def _continue(
        self, prompts: Sequence[Sequence[int]], tables: list[list[int]], firsts: list[int], num_continued: int
    ) -> list[tuple[int, ...]]:
        """Decode all prompts of a group together, greedily."""
        ends = set(self.info.eos_token_ids)
        continued = [[first] for first in firsts]
        running = [at for at, first in enumerate(firsts) if first not in ends]
        for step in range(num_continued - 1):
            if not running:
                break
            chunks = [SequenceChunk([continued[at][-1]], len(prompts[at]) + step, tables[at]) for at in running]
            chosen = self._runner.forward(self._runner.batch(chunks)).argmax(dim=-1).tolist()
            for at, token in zip(running, chosen, strict=True):
                continued[at].append(token)
            running = [at for at in running if continued[at][-1] not in ends]
        return [tuple(tokens) for tokens in continued]

    def _groups(self, prompts: Sequence[Sequence[int]], num_continued: int) -> list[list[Sequence[int]]]:
        """Cut `prompts` into runs that the pool holds at once."""
        groups: list[list[Sequence[int]]] = []
        free = 0
        for prompt in prompts:
            needed = -(-(len(prompt) + num_continued) // self._size)
            assert needed <= self._runner.pool.num_blocks, "the pool holds less than one prompt"
            if needed > free or not groups:
                groups.append([])
                free = self._runner.pool.num_blocks
            groups[-1].append(prompt)
            free -= needed
        return groups

    def _tables(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return block tables for sequences of these lengths, from block 0 on."""
        tables: list[list[int]] = []
        start = 0
        for length in lengths:
            end = start + -(-length // self._size)
            tables.append(list(range(start, end)))
            start = end
        return tables


def rope_theta_of(path: Path) -> float | None:
    """Return the base of the model's rotary embedding; None where it is not the plain one over all of head_dim.

    Raises:
        ConfigError: `path` is not a checkpoint that this engine serves.
    """
    config, _ = read_checkpoint(ModelConfig(path=path))
    rope = getattr(config, "rope_parameters", None) or {}
    is_plain = rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    theta = rope.get("rope_theta")
    return float(theta) if is_plain and theta else None
