"""What cannot be served is refused in one line that names the key, and before anything large is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, T5Config

from core.errors import ConfigError
from engine.config import EngineConfig, ModelConfig
from engine.forward import SequenceChunk
from engine.runner import ModelRunner

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
)


def dummy(**changes: Any) -> Callable[[Path], tuple[ModelConfig, EngineConfig]]:
    engine = {key: changes.pop(key) for key in list(changes) if key in EngineConfig.model_fields}
    config = changes.pop("config", LLAMA)

    def build(path: Path) -> tuple[ModelConfig, EngineConfig]:
        config.save_pretrained(path)
        model = ModelConfig(path=path, load_format="dummy", **changes)
        return model, EngineConfig(**{"num_blocks": 16, "num_threads": 1, **engine})

    return build


def edited(**changes: Any) -> Callable[[Path], tuple[ModelConfig, EngineConfig]]:
    def build(path: Path) -> tuple[ModelConfig, EngineConfig]:
        built = dummy()(path)
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return built

    return build


def missing(path: Path) -> tuple[ModelConfig, EngineConfig]:
    return ModelConfig(path=path / "nowhere"), EngineConfig()


def empty(path: Path) -> tuple[ModelConfig, EngineConfig]:
    return ModelConfig(path=path), EngineConfig()


def without_weights(path: Path) -> tuple[ModelConfig, EngineConfig]:
    LLAMA.save_pretrained(path)
    return ModelConfig(path=path), EngineConfig()


def damaged_weights(path: Path) -> tuple[ModelConfig, EngineConfig]:
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return ModelConfig(path=path), EngineConfig()


def missing_weights(path: Path) -> tuple[ModelConfig, EngineConfig]:
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    return ModelConfig(path=path), EngineConfig()


def no_json(path: Path) -> tuple[ModelConfig, EngineConfig]:
    (path / "config.json").write_text("{")
    return ModelConfig(path=path, load_format="dummy"), EngineConfig()


CASES: dict[str, tuple[Callable[[Path], tuple[ModelConfig, EngineConfig]], str]] = {
    "missing path": (missing, r"model\.path: .*nowhere does not exist"),
    "empty folder": (empty, r"model\.path: .* no config\.json"),
    "no weights": (without_weights, r"model\.path: .* no \.safetensors"),
    "damaged weights": (damaged_weights, r"model\.path: .*cannot load the weights"),
    "missing weights": (missing_weights, r"model\.path: .*missing keys in the weights: model\.layers\.2"),
    "not json": (no_json, r"model\.path: .*config\.json"),
    "unknown type": (edited(model_type="nonesuch"), r"model\.path: .*nonesuch"),
    "encoder-decoder": (dummy(config=T5Config(num_layers=1)), r"t5 is not supported: it is an encoder-decoder"),
    "soft-capped": (dummy(config=Gemma2Config(num_hidden_layers=1)), r"gemma2 is not supported: .*soft-capped"),
    "latent kv": (edited(kv_lora_rank=16), r"latent KV"),
    "linear layers": (edited(layer_types=["linear_attention", "full_attention"]), r"layers of type linear_attention"),
    "dynamic rope": (
        edited(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        r"rope type dynamic",
    ),
    "longer than the model": (dummy(max_model_len=129), r"model\.max_model_len: 129 is more than the model's own 128"),
    "longer than the pool": (dummy(max_model_len=128, num_blocks=7), r"model\.max_model_len: 128 tokens do not fit"),
    "pool below one block": (dummy(num_blocks=None, kv_cache_bytes=100), r"kv_cache_bytes: 100 is less than one block"),
    "pool above memory": (dummy(num_blocks=10**9), r"kv_cache_bytes: the KV pool needs"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    build, message = CASES[case]
    model, engine = build(tmp_path)
    with pytest.raises(ConfigError, match=message) as refusal:
        ModelRunner.load(model, engine)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    model, engine = dummy(device="cuda")(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.device: cuda"):
        ModelRunner.load(model, engine)


def test_another_family_runs_through_the_plain_path(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    runner = ModelRunner.load(ModelConfig(path=tmp_path), EngineConfig(num_blocks=8, num_threads=1))
    assert not runner.fused
    got = runner.forward(runner.batch([SequenceChunk([3, 1, 4, 1, 5], 0, [2])]))
    with torch.inference_mode():
        want = reference(torch.tensor([[3, 1, 4, 1, 5]])).logits[0, -1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "values",
    [{"num_blocks": 1, "kv_cache_bytes": 1}, {"block_size": 0}, {"attention_backend": "flash"}, {"num_threads": 0}],
    ids=["two sizes", "block size", "backend", "threads"],
)
def test_engine_config_ranges(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EngineConfig(**values)
