"""A model that remembers: its next token depends on every token before, as read back through the block table.

It stands in for `engine.runner.ModelRunner`. It stores (token, position) of each token in every layer of the pool, and
its logits are a function of the whole history found there; so any error in block tables, sharing, recycling or copying
shows up as a wrong token. `history_logits` is the reference, without any pool.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from core.request import GenerateRequest, RequestOutput, SamplingParams
from core.text import IncrementalDetokenizer
from engine.checkpoint import ModelInfo
from engine.config import EngineConfig
from engine.counter_random import mix64
from engine.engine import Engine
from engine.forward import ForwardBatch
from engine.pool import KvPool
from engine.sampler import Sampler, SamplingState

VOCAB_SIZE = 97
EOS = 96
NUM_LAYERS = 3
_TOKEN, _POSITION = 0, 1  # where the head dimension keeps what


class FakeRunner:
    """See the module. `fail_next` makes the next forward pass raise; a history with a `poison` token gives NaN."""

    def __init__(self, *, num_blocks: int, block_size: int = 4, max_model_len: int = 64) -> None:
        self.info = ModelInfo(
            name="fake",
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            weights_version="fake",
            dtype="float32",
            num_layers=NUM_LAYERS,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
        )
        self.pool = KvPool(self.info.kv_layout(block_size), num_blocks)
        self.fail_next: Exception | None = None
        self.poison: int | None = None
        self.batch_sizes: list[tuple[int, ...]] = []

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        if self.fail_next is not None:
            failure, self.fail_next = self.fail_next, None
            raise failure
        self.batch_sizes.append(batch.query_lens)
        blocks, offsets = (
            batch.slot_mapping // self.pool.layout.block_size,
            batch.slot_mapping % self.pool.layout.block_size,
        )
        for layer in range(NUM_LAYERS):
            for side in range(2):
                self.pool.kv[blocks, layer, side, 0, offsets, _TOKEN] = batch.token_ids.float()
                self.pool.kv[blocks, layer, side, 0, offsets, _POSITION] = batch.positions.float()
            if on_layer is not None:
                on_layer(layer)
        wanted = set(batch.logits_rows.tolist())
        scored = set(batch.scored_rows.tolist())
        rows, states = [], []
        for sequence, length in enumerate(batch.context_lens_host):
            if int(batch.query_starts[sequence + 1]) - 1 in wanted:
                history = self._history(batch.block_tables[sequence], length)
                rows.append(torch.full((VOCAB_SIZE,), torch.nan) if self.poison in history else history_logits(history))
            for row in range(int(batch.query_starts[sequence]), int(batch.query_starts[sequence + 1])):
                if row in scored:
                    history = self._history(batch.block_tables[sequence], int(batch.places[row]) + 1)
                    states.append(torch.tensor(history + [-1] * (self.info.max_model_len - len(history))))
        if states:
            batch.scored_states.append(torch.stack(states))
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        histories = ([token for token in row if token >= 0] for row in states.tolist())
        return torch.stack([history_logits(history) for history in histories])

    def _history(self, block_table: torch.Tensor, length: int) -> list[int]:
        frame = self.pool.read(block_table.long(), range(NUM_LAYERS), range(length))  # [L, 2, 1, T, 2]
        assert (frame == frame[:1, :1]).all(), "the layers disagree"
        assert frame[0, 0, 0, :, _POSITION].tolist() == list(range(length)), "a position holds another position's KV"
        return [int(token) for token in frame[0, 0, 0, :, _TOKEN].tolist()]


def history_logits(tokens: Sequence[int]) -> torch.Tensor:
    """Return float32 [V]: noise that depends on the whole history."""
    digest = 0
    for token in tokens:
        digest = mix64(digest ^ (token + 1))
    generator = np.random.default_rng(digest)
    return torch.from_numpy(generator.normal(scale=2.0, size=VOCAB_SIZE).astype(np.float32))


def reference_tokens(request: GenerateRequest, *, max_model_len: int = 64) -> list[int]:
    """Return what any engine must generate for `request` (without stop strings), one token at a time, alone."""
    sampler = Sampler(VOCAB_SIZE)
    state = SamplingState(request.sampling, request.prompt_token_ids, (EOS,))
    tokens = list(request.prompt_token_ids)
    generated: list[int] = []
    while len(generated) < request.sampling.max_tokens and len(tokens) < max_model_len:
        (token,) = sampler.choose(history_logits(tokens)[None].clone(), [state]).token_ids
        state.add(token)
        tokens.append(token)
        generated.append(token)
        if token in state.end_token_ids:
            break
    return generated


def fake_engine(
    *,
    num_blocks: int = 32,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_num_requests: int = 8,
    max_num_waiting: int = 64,
    prefix_cache: bool = True,
    max_cached_blocks: int | None = None,
    max_model_len: int = 64,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Engine:
    """Return an engine over a `FakeRunner`."""
    runner = FakeRunner(num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len)
    bytes_per_block = runner.pool.layout.bytes_per_block
    config = EngineConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        max_num_requests=max_num_requests,
        max_num_waiting=max_num_waiting,
        prefix_cache=prefix_cache,
        prefix_cache_bytes=None if max_cached_blocks is None else max_cached_blocks * bytes_per_block,
        layer_group_size=2,
    )
    return Engine(runner, config, partial(IncrementalDetokenizer, decode) if decode is not None else None)


def greedy(max_tokens: int = 8, **changes: object) -> SamplingParams:
    """Return greedy parameters."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **changes)  # type: ignore[arg-type]


def run_to_end(engine: Engine, *, max_steps: int = 1000) -> dict[str, list[RequestOutput]]:
    """Step until there is no work; return every output by request."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    raise AssertionError(f"work is left after {max_steps} steps")


def token_ids(outputs: Sequence[RequestOutput]) -> list[int]:
    """Return the token ids of one request's outputs, whose indices must be contiguous."""
    tokens = [token for output in outputs for token in output.tokens]
    assert [token.index for token in tokens] == list(range(tokens[0].index, tokens[0].index + len(tokens)))
    return [token.token_id for token in tokens]
