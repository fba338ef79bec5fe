"""What to load and how to run it. Torch-free: the cluster composes these models without loading torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from core.config import ConfigModel

# What a process that runs an engine on more than one CPU thread should be started with (it is read when torch loads).
# Between two operators the threads wait for each other by spinning. libgomp's default is to spin for milliseconds: when
# another process wants the core, the spinner uses up its turn and every operator then waits for the scheduler (measured
# on a loaded machine: 50 times slower). Spinning for some tens of microseconds bridges the gaps between operators.
PROCESS_ENVIRONMENT = {"GOMP_SPINCOUNT": "3000"}

AttentionName = Literal["auto", "sdpa", "numba"]


class ModelConfig(ConfigModel):
    """One checkpoint and where it runs."""

    path: Path = Field(description="checkpoint folder in Hugging Face layout; for load_format dummy also a config.json")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto reads safetensors; dummy makes seeded random weights of the configuration"
    )
    served_name: str = Field("", description="name that clients use; empty means the folder's name")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto keeps the checkpoint's own dtype")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    max_model_len: int | None = Field(None, ge=2, description="prompt plus output; default and cap: the model's own")
    seed: int = Field(0, ge=0, description="seed of dummy weights")

    @property
    def name(self) -> str:
        """The name that clients use."""
        if self.served_name:
            return self.served_name
        path = self.path.parent if self.path.suffix == ".json" else self.path
        return path.name or path.resolve().name


class EngineConfig(ConfigModel):
    """How one engine uses its device. With neither `kv_cache_bytes` nor `num_blocks` the pool sizes itself."""

    block_size: int = Field(16, ge=1, le=256, description="tokens per KV block")
    kv_cache_bytes: int | None = Field(None, gt=0, description="cap of the KV pool")
    num_blocks: int | None = Field(None, gt=0, description="exact size of the KV pool, instead of a byte cap")
    max_batch_tokens: int = Field(512, ge=1, description="tokens per step: decodes first, the rest is prompt chunks")
    max_num_requests: int = Field(64, ge=1, description="requests in the batch at once")
    max_num_waiting: int = Field(1024, ge=1, description="accepted requests not yet in the batch; more are refused")
    num_threads: int | None = Field(None, ge=1, description="CPU threads per step; default: all cores of the process")
    prefix_cache: bool = Field(True, description="keep the blocks of finished prompts for requests that share them")
    prefix_cache_bytes: int | None = Field(None, gt=0, description="cap of the prefix cache; default: the whole pool")
    attention_backend: AttentionName = Field("auto", description="auto: the fastest that this machine can run")
    fuse_modules: bool = Field(True, description="CPU: run known decoder layers through fused kernels")
    score_window: int = Field(
        0,
        ge=0,
        le=1024,
        description="prefill: so many last prompt tokens (fewer after a prefix hit) score the others; 0: no scores",
    )
    layer_group_size: int = Field(4, ge=1, description="layers per KV frame of a hand-off")
    mask_wait_s: float = Field(
        0.05, gt=0, description="a step awaits what constraints allow so long; a later request leaves out the step"
    )
    mask_timeout_s: float = Field(
        2.0, gt=0, description="a request whose constraint takes longer to say what it allows next is given up"
    )

    def cached_blocks(self, num_blocks: int, bytes_per_block: int) -> int:
        """Return how many blocks of a pool of `num_blocks` the prefix cache may own."""
        if not self.prefix_cache:
            return 0
        if self.prefix_cache_bytes is None:
            return num_blocks
        return min(num_blocks, self.prefix_cache_bytes // bytes_per_block)

    @model_validator(mode="after")
    def _one_pool_size(self) -> "EngineConfig":
        if self.kv_cache_bytes is not None and self.num_blocks is not None:
            raise ValueError("give kv_cache_bytes or num_blocks, not both")
        return self
