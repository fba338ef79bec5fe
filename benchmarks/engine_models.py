"""The models of the engine benchmark. Every side reads the same files."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class BenchModel:
    """`prepare` returns the checkpoint's folder, made on first use."""

    name: str
    vocab_size: int
    max_model_len: int
    prepare: Callable[[], Path]


def _dummy_125m() -> Path:
    """12 layers x 768, 12 heads, 4 kv heads, intermediate 3,072, tied embeddings: 128 million seeded random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = ROOT / "build" / "bench" / "llama-125m"
    if not (path / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=3_072,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=4_096,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(path)
    return path


MODELS = {
    "tandem-tiny": BenchModel("tandem-tiny", 4_096, 2_048, lambda: ROOT / "models" / "tiny"),
    "llama-125m-dummy": BenchModel("llama-125m-dummy", 32_000, 2_304, _dummy_125m),
}
