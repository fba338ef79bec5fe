"""Which attention backend a machine runs."""

from importlib.util import find_spec

import torch

from core.errors import ConfigError
from engine.attention.base import AttentionBackend
from engine.attention.sdpa import SdpaAttention
from engine.config import AttentionName
from engine.pool import KvPool


def has_cpu_kernels(device: torch.device) -> bool:
    """Whether the numba kernels can run: a CPU device and numba installed (machines with GPUs need it not)."""
    return device.type == "cpu" and find_spec("numba") is not None


def make_attention(name: AttentionName, pool: KvPool) -> AttentionBackend:
    """Build the backend `name` over `pool`; `auto` takes the fastest.

    Raises:
        ConfigError: the backend cannot run here.
    """
    usable = has_cpu_kernels(pool.kv.device)
    if name == "sdpa" or (name == "auto" and not usable):
        return SdpaAttention(pool)
    if not usable:
        raise ConfigError("attention_backend: numba needs device cpu and the numba package; use auto or sdpa")
    from engine.attention.numba_cpu import NumbaAttention  # imports numba

    return NumbaAttention(pool)
