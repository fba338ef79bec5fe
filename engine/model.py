"""Loading a transformers model: weights from safetensors or seeded dummies, our attention, the right device.

The result is the plain transformers module; `engine.fused` may then rebuild its layers for the CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from core.errors import ConfigError
from engine.attention.transformers_door import ATTENTION_NAME
from engine.config import ModelConfig
from engine.pool import TORCH_DTYPES


def resolve_device(name: str, dtype: str) -> torch.device:
    """Return the device `name`.

    Raises:
        ConfigError: it is absent, or cannot compute in `dtype`.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("model.device: cuda was asked for, but this machine (or this torch build) has none")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(f"model.device: {name} was asked for, but there are {torch.cuda.device_count()} devices")
        if dtype == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
            raise ConfigError(f"model.dtype: bfloat16 is not supported on {torch.cuda.get_device_name(device)}")
    return device


def load_model(model: ModelConfig, config: PreTrainedConfig, dtype: str, device: torch.device) -> PreTrainedModel:
    """Build the model with its weights, in evaluation mode, on `device`.

    Raises:
        ConfigError: the weights do not fit the configuration, cannot be read, or do not fit the device.
    """
    try:
        with _quiet_transformers():
            if model.load_format == "dummy":
                loaded = _dummy(config, model.seed, dtype)
            else:
                loaded, report = AutoModelForCausalLM.from_pretrained(
                    model.path,
                    config=config,
                    dtype=TORCH_DTYPES[dtype],
                    attn_implementation=ATTENTION_NAME,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
                _check_complete(model, report)
        loaded = loaded.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"model.device: {device} has not enough memory for the weights of {model.path}") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model.path: {model.path}: cannot load the weights: {line.strip()}") from error
    return loaded


def _dummy(config: PreTrainedConfig, seed: int, dtype: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype], attn_implementation=ATTENTION_NAME)


def _check_complete(model: ModelConfig, report: dict[str, object]) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in report.get(kind, ()))  # type: ignore[attr-defined]
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ConfigError(f"model.path: {model.path}: {kind.replace('_', ' ')} in the weights: {keys[0]}{more}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading reports progress through the engine's callback; transformers' own bars and warnings are switched off."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
            transformers_logging.enable_progress_bar()
