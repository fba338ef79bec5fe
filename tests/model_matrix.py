"""The model families that every token-identity test runs over, and transformers' own answer for each.

Small random models, saved as checkpoints, whose logits differ clearly; and tandem-tiny, the trained one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 317
MAX_MODEL_LEN = 256
TINY_PATH = Path(__file__).resolve().parent.parent / "models" / "tiny"
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, head_dim=32, sliding_window=40),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32),
}


def checkpoint(family: str, folder: Path) -> Path:
    """Return a checkpoint of `family` (or "tiny"), written below `folder` unless it is there."""
    if family == "tiny":
        return TINY_PATH
    path = folder / family
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).save_pretrained(path)
    return path


def prompts(vocab_size: int, count: int = 16) -> list[tuple[int, ...]]:
    """Return prompts of 1 to about 60 tokens; the odd ones share their beginning with the one before."""
    generator = torch.Generator().manual_seed(11)
    made: list[tuple[int, ...]] = []
    for at in range(count):
        length = int(torch.randint(1, 60, (1,), generator=generator)) if at else 1
        fresh = torch.randint(2, vocab_size, (length,), generator=generator).tolist()
        made.append((*made[-1][:33], *fresh[:20]) if at % 2 else tuple(fresh))
    return made


def generate(path: Path, prompt_token_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Return what `transformers` generates greedily in float32 for each prompt alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    answers = []
    for prompt in prompt_token_ids:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers
