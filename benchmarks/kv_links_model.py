"""What the links benchmark moves: KV that tandem-tiny really computed, in pools behind block tables, and its profiles.

The KV of 16 windows of 2,048 tokens of held-out text is recorded once and laid end to end; every request reads it from
another place on, wrapping around. So prompts may be longer than the model's own limit, and no two are the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from core.errors import ConfigError
from core.ids import RequestId
from core.layout import KvLayout
from engine.checkpoint import read_checkpoint
from engine.config import ModelConfig
from engine.pool import KvPool

MODEL = Path(__file__).parent.parent / "models" / "tiny"
BLOCK_TOKENS = 16
_PROMPTS = MODEL / "validation_prompts.jsonl"
_WINDOW_TOKENS = 2048
_STRIDE = 7919  # a prime: successive requests begin far apart


def layout_of_tiny() -> KvLayout:
    """Return the geometry of tandem-tiny, as a worker would."""
    _, info = read_checkpoint(ModelConfig(path=MODEL))
    return info.kv_layout(BLOCK_TOKENS)


def texts_of_tiny() -> list[str]:
    """Return the model's held-out validation prompts."""
    return [json.loads(line)["text"] for line in _PROMPTS.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def record_kv(texts: Sequence[str], num_windows: int = 16) -> Tensor:
    """Return canonical KV [L, 2, K, T, D] of windows of held-out text, end to end."""
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    ids = torch.tensor([token for text in texts for token in tokenizer(text).input_ids])
    windows = ids[: len(ids) // _WINDOW_TOKENS * _WINDOW_TOKENS].view(-1, _WINDOW_TOKENS)[:num_windows]
    if not len(windows):
        raise ConfigError(f"{len(ids)} tokens of text are less than one window")
    recorded = []
    for window in windows:
        cache = model.model(window[None], use_cache=True).past_key_values
        recorded.append(torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]))
    return torch.cat(recorded, dim=3).contiguous()


class Tables:
    """Block tables of requests over one pool; a table is where a request's tokens lie."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._tables: dict[RequestId, Tensor] = {}

    def place(self, request_id: RequestId, first_block: int, num_tokens: int) -> None:
        blocks = first_block + torch.arange(-(-num_tokens // BLOCK_TOKENS))
        self._tables[request_id] = blocks % self.num_blocks

    def of(self, request_id: RequestId) -> Tensor:
        return self._tables[request_id]

    def clear(self) -> None:
        self._tables.clear()


class RecordedPool:
    """The prefill worker's pool: the recorded KV, from another block on for every request."""

    def __init__(self, layout: KvLayout, kv: Tensor) -> None:
        num_blocks = kv.shape[3] // BLOCK_TOKENS
        self.tables = Tables(num_blocks)
        self._pool = KvPool(layout, num_blocks)
        self._pool.write(torch.arange(num_blocks), range(layout.num_layers), range(num_blocks * BLOCK_TOKENS), kv)

    def place(self, request_id: RequestId, index: int, num_tokens: int) -> None:
        self.tables.place(request_id, index * _STRIDE % self.tables.num_blocks, num_tokens)

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: Tensor | None = None,
        heads: range | None = None,
    ) -> Tensor:
        return self._pool.read(self.tables.of(request_id), layers, tokens, out)


class LandingPool:
    """The decode worker's pool: blocks are given out in a circle, so the KV of the latest requests can be looked at."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.tables = Tables(num_blocks)
        self._pool = KvPool(layout, num_blocks)
        self._next_block = 0

    def place(self, request_id: RequestId, num_tokens: int) -> None:
        self.tables.place(request_id, self._next_block, num_tokens)
        self._next_block += -(-num_tokens // BLOCK_TOKENS)

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        self._pool.write(self.tables.of(request_id), layers, tokens, kv)

    def read(self, request_id: RequestId, layers: range, tokens: range) -> Tensor:
        return self._pool.read(self.tables.of(request_id), layers, tokens)


def relative_error(landed: Tensor, sent: Tensor) -> float:
    """Return the root mean square of the difference over that of what was sent; 0 when they are equal bit for bit."""
    if torch.equal(landed, sent):
        return 0.0
    difference = (landed.float() - sent.float()).square().mean().sqrt()
    return float(difference / sent.float().square().mean().sqrt())
