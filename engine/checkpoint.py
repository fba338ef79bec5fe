"""What a checkpoint is, before its weights are loaded: configuration, geometry, refusals, fingerprint.

Everything that can be said from config.json is said here, as one line that names the key of our configuration.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.errors import ConfigError
from core.layout import KvLayout
from engine.config import ModelConfig
from engine.pool import TORCH_DTYPES

_HASH_ALL_BYTES = 64 * 2**20  # files up to this size are hashed whole
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of a loaded model.

    Attributes:
        max_model_len: prompt plus output, in tokens.
        eos_token_ids: what ends a generation; may be empty.
        weights_version: fingerprint of configuration and weights; equal on every worker that may share KV.
        dtype: a key of `core.layout.DTYPE_BYTES`.
        has_sliding_window: some layer sees only the last tokens: a place in the pool must then be a position.
    """

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weights_version: str
    dtype: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_sliding_window: bool = False

    def kv_layout(self, block_size: int) -> KvLayout:
        return KvLayout(self.weights_version, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, block_size)


def read_checkpoint(model: ModelConfig) -> tuple[PreTrainedConfig, ModelInfo]:
    """Read and judge the configuration of `model`. Loads no weights.

    Raises:
        ConfigError: no such path, not a checkpoint, or nothing that this engine can serve.
    """
    config = _read_config(model)
    _refuse_unsupported(config, model)
    num_heads = int(config.num_attention_heads)
    limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    wanted = model.max_model_len or limit
    if not wanted:
        raise ConfigError("model.max_model_len: the checkpoint states no limit; give one")
    if limit and wanted > limit:
        raise ConfigError(f"model.max_model_len: {wanted} is more than the model's own {limit}")
    dtype = _dtype_name(config, model)
    info = ModelInfo(
        name=model.name,
        vocab_size=int(config.vocab_size),
        max_model_len=wanted,
        eos_token_ids=_eos_token_ids(config, model.path),
        weights_version=_weights_version(config, model, dtype),
        dtype=dtype,
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        has_sliding_window=_has_sliding_window(config),
    )
    return config, info


def _read_config(model: ModelConfig) -> PreTrainedConfig:
    path = model.path
    if not path.exists():
        raise ConfigError(f"model.path: {path} does not exist")
    config_file = path if path.is_file() else path / "config.json"
    if not config_file.is_file() or config_file.suffix != ".json":
        raise ConfigError(f"model.path: {path} is not a Hugging Face checkpoint: it has no config.json")
    if path.is_file() and model.load_format != "dummy":
        raise ConfigError(f"model.path: {path} is a file; give the checkpoint's folder, or load_format dummy")
    if model.load_format == "auto" and not _weight_files(path):
        raise ConfigError(f"model.path: {path} holds no .safetensors files; give weights, or load_format dummy")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(config_file, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.path: {config_file}: {_first_line(error)}") from error
    return config


def _refuse_unsupported(config: PreTrainedConfig, model: ModelConfig) -> None:
    def refuse(why: str) -> None:
        raise ConfigError(f"model.path: {model.path}: model type {config.model_type} is not supported: {why}")

    if config.is_encoder_decoder:
        refuse("it is an encoder-decoder")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        refuse("transformers has no causal language model for it")
    if getattr(config, "kv_lora_rank", None):
        refuse("its attention keeps a latent KV (MLA)")
    if getattr(config, "attn_logit_softcapping", None):
        refuse("its attention scores are soft-capped")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        refuse(f"it has layers of type {sorted(kinds)[0]}")
    missing = [key for key in ("num_attention_heads", "num_hidden_layers", "vocab_size") if not hasattr(config, key)]
    if missing:
        refuse(f"its config.json has no {missing[0]}")
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if rope_type in ("dynamic", "longrope"):
        refuse(f"rope type {rope_type} makes a token's rotation depend on how long the sequence will be")


def _has_sliding_window(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _dtype_name(config: PreTrainedConfig, model: ModelConfig) -> str:
    if model.dtype != "auto":
        return model.dtype
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    name = next((name for name, dtype in TORCH_DTYPES.items() if dtype == own), "float32")
    return "bfloat16" if name == "float16" else name  # the range of float16 is too small to serve it blindly


def _eos_token_ids(config: PreTrainedConfig, path: Path) -> tuple[int, ...]:
    eos: Any = config.eos_token_id
    folder = path if path.is_dir() else path.parent
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        eos = generation.eos_token_id if generation.eos_token_id is not None else eos
    if eos is None:
        return ()
    return tuple(int(token_id) for token_id in eos) if isinstance(eos, list | tuple) else (int(eos),)


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _weights_version(config: PreTrainedConfig, model: ModelConfig, dtype: str) -> str:
    """Hash of configuration, dtype and weights: whole small files, evenly spread samples of large ones."""
    digest = xxhash.xxh3_128()
    facts = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    digest.update(repr(sorted(facts.items(), key=lambda item: item[0])).encode())
    digest.update(f"{dtype}:{model.load_format}".encode())
    if model.load_format == "dummy":
        digest.update(str(model.seed).encode())
        return digest.hexdigest()
    for path in _weight_files(model.path):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if size <= _HASH_ALL_BYTES:
                digest.update(file.read())
                continue
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, 2**24)))
            for sample in range(_NUM_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
