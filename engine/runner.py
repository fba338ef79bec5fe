"""The model with its KV pool: one call computes one step.

`load` does, in order: judge config.json, load weights, size and allocate the pool, rebuild the layers for the CPU where
that is possible, run a probe (an unsupported kind of attention is found here, kernels are compiled here). Afterwards
`forward` neither compiles nor allocates anything large.

Threads: torch's thread count is a property of the process (the last `load` sets it) that every calling thread has to
take up for itself, since an OpenMP team belongs to the thread that calls.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from threading import get_ident
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import PreTrainedModel

from core.errors import ConfigError
from core.layout import KvLayout
from engine.attention.base import AttentionBackend
from engine.attention.select import has_cpu_kernels, make_attention
from engine.checkpoint import ModelInfo, read_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.forward import ForwardBatch, SequenceChunk, build_batch
from engine.model import load_model, resolve_device
from engine.plain import PlainDecoder
from engine.pool import KvPool
from engine.threads import StepCost

_LOG = logging.getLogger(__name__)
_DEFAULT_CPU_POOL_BYTES = 512 * 2**20
_DEFAULT_GPU_POOL_RATIO = 0.85  # of the memory that is free after the weights

if TYPE_CHECKING:  # it imports numba
    from engine.fused import FusedDecoder

Progress = Callable[[str, float], None]


class ModelRunner:
    """A loaded model.

    Attributes:
        info: facts of the model; `max_model_len` is capped by what the pool can hold.
        pool: keys and values; whoever builds batches owns its blocks.
        fused: whether the CPU's fused layers run.

    Concurrency: one `forward` at a time; frames of other sequences' blocks may be read and written meanwhile.
    """

    def __init__(self, info: ModelInfo, pool: KvPool, decoder: "FusedDecoder | PlainDecoder", cost: StepCost) -> None:
        self.info = info
        self.pool = pool
        self.fused = not isinstance(decoder, PlainDecoder)
        self._decoder = decoder
        self._cost = cost
        self._num_threads = torch.get_num_threads()
        self._prepared = (0, 0)  # thread id, thread count that it has taken up

    @classmethod
    def load(
        cls, model: ModelConfig, config: EngineConfig, progress: Progress = lambda stage, fraction: None
    ) -> "ModelRunner":
        """Load everything that serving needs.

        Args:
            progress: told (stage, fraction of the whole load that is done).
        Raises:
            ConfigError: one line; nothing is kept.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        progress("reading configuration", 0.0)
        checkpoint, info = read_checkpoint(model)
        device = resolve_device(model.device, info.dtype)
        progress("loading weights", 0.05)
        module = load_model(model, checkpoint, info.dtype, device)
        progress("allocating the KV pool", 0.6)
        layout = info.kv_layout(config.block_size)
        pool = KvPool(layout, _pool_blocks(config, layout, device), device)
        info = _fit_to_pool(info, model, pool)
        backend = make_attention(config.attention_backend, pool)
        progress("preparing layers", 0.7)
        cost = _step_cost(module, info)  # before the layers' weights move
        with torch.inference_mode():
            fused = _fuse(module, pool, backend, config, info) if config.fuse_modules else None
            runner = cls(info, pool, fused or PlainDecoder(module, pool, backend), cost)
            progress("warming up", 0.9)
            runner._warm_up()
        progress("loaded", 1.0)
        return runner

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Compute one step: writes K and V of the batch into the pool.

        Args:
            on_layer: called with i on this thread right after layer i's K and V of the batch are in the pool.
        Returns:
            float32 logits [R, V] of `batch.logits_rows`, in their order; owned by the caller.
        """
        wanted = (get_ident(), self._cost.threads(batch.num_tokens, self._num_threads))
        if self._prepared != wanted:
            torch.set_num_threads(wanted[1])
            self._prepared = wanted
        return self._decoder.forward(batch, on_layer)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, V] of rows of the last batch's `scored_states`; owned by the caller."""
        return self._decoder.logits(states)

    def batch(self, chunks: list[SequenceChunk]) -> ForwardBatch:
        """Build a batch for this pool and device."""
        return build_batch(chunks, self.pool.layout.block_size, self.pool.kv.device)

    def _warm_up(self) -> None:
        """Run small batches through everything, once; block 0 is dirtied and cleaned.

        Raises:
            ConfigError: layers of a plain module do not go through the paged attention.
        """
        size = self.pool.layout.block_size
        for length in sorted({1, size}):
            self.forward(self.batch([SequenceChunk([0] * length, 0, [0])]))
        if isinstance(self._decoder, PlainDecoder):
            self._decoder.probe(self.batch([SequenceChunk([0], 0, [0])]), self.info.num_layers)
        self.pool.kv[0].zero_()


def _fuse(
    module: PreTrainedModel, pool: KvPool, backend: AttentionBackend, config: EngineConfig, info: ModelInfo
) -> "FusedDecoder | None":
    """Rebuild the layers for the CPU; None where that cannot be done.

    Raises:
        ConfigError: a later layer differs than the first, which would have kept the plain path.
    """
    if not has_cpu_kernels(pool.kv.device) or config.attention_backend == "sdpa":
        return None
    from engine.fused import FusedDecoder, FusionMismatch, can_fuse  # imports numba

    if not can_fuse(module):
        return None
    try:
        return FusedDecoder(module, pool, backend, info.max_model_len)
    except FusionMismatch as error:
        if error.layer_idx == 0:
            _LOG.warning("fused layers are not exact on this machine, plain ones are used: %s", error)
            return None
        raise ConfigError(
            f"fuse_modules: the fused layers are not exact on this machine ({error}); set it to false"
        ) from error


def _pool_blocks(config: EngineConfig, layout: KvLayout, device: torch.device) -> int:
    """Return N.

    Raises:
        ConfigError: not one block fits.
    """
    if device.type == "cuda":
        available = int(torch.cuda.mem_get_info(device)[0])
        default = int(available * _DEFAULT_GPU_POOL_RATIO)
    else:
        available = psutil.virtual_memory().available
        default = min(_DEFAULT_CPU_POOL_BYTES, available // 2)
    wanted = default if config.kv_cache_bytes is None else config.kv_cache_bytes
    blocks = config.num_blocks or wanted // layout.bytes_per_block
    if blocks < 1:
        raise ConfigError(f"kv_cache_bytes: {wanted} is less than one block of {layout.bytes_per_block} bytes")
    if blocks * layout.bytes_per_block > available:
        needed, free = blocks * layout.bytes_per_block / 2**20, available / 2**20
        raise ConfigError(f"kv_cache_bytes: the KV pool needs {needed:.0f} MiB, {device} has {free:.0f} MiB free")
    return blocks


def _step_cost(module: PreTrainedModel, info: ModelInfo) -> StepCost:
    embedding = module.get_input_embeddings().weight
    head = module.get_output_embeddings().weight
    matrices = [weight for weight in module.parameters() if weight.dim() == 2 and weight is not embedding]
    num_weights = sum(weight.numel() for weight in matrices) + (head.numel() if head is embedding else 0)
    return StepCost(num_weights, num_weights * embedding.element_size(), info.num_layers, info.dtype)


def _fit_to_pool(info: ModelInfo, model: ModelConfig, pool: KvPool) -> ModelInfo:
    """Cap the model's length by the pool.

    Raises:
        ConfigError: the configuration asks for sequences that the pool cannot hold.
    """
    tokens = pool.num_blocks * pool.layout.block_size
    if model.max_model_len is not None and tokens < model.max_model_len:
        raise ConfigError(
            f"model.max_model_len: {model.max_model_len} tokens do not fit a KV pool of {tokens}; raise kv_cache_bytes"
        )
    return replace(info, max_model_len=min(info.max_model_len, tokens))
