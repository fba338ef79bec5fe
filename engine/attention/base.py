"""The interface of an attention backend.

Who calls what, once per step: the runner calls `plan` with the batch; then for every layer, after the K and V of the
batch are in the pool, the model calls `attend`. A plan may be reused for any layer of its batch. Backends keep no
state between steps, and neither write the pool nor know who owns a block.
"""

from typing import Any, Protocol

import torch

from engine.forward import ForwardBatch
from engine.pool import KvPool


class AttentionBackend(Protocol):
    """Causal attention of a packed batch over paged keys and values."""

    name: str

    def plan(self, batch: ForwardBatch) -> Any:
        """Prepare what all layers share (index tables, buckets by length)."""

    def attend(self, query: torch.Tensor, layer_idx: int, plan: Any, *, scaling: float, window: int) -> torch.Tensor:
        """Attend every query token to its sequence's positions up to and including its own.

        Args:
            query: [T, H, D] of the pool's dtype; rows may be strided, a row's [H, D] is contiguous. Query head h
                reads kv head ``h // (H // K)``.
            plan: of this step's batch.
            scaling: factor of the scores.
            window: how many of the last positions are seen, own one included; 0 sees all.
        Returns:
            [T, H * D], contiguous, owned by the caller.
        """


def write_tokens(
    pool: KvPool, layer_idx: int, slot_mapping: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Put keys and values [T, K, D] of one layer into their slots."""
    size = pool.layout.block_size
    blocks, offsets = slot_mapping // size, slot_mapping % size
    layer_keys, layer_values = pool.layer(layer_idx)
    layer_keys[blocks, :, offsets] = keys
    layer_values[blocks, :, offsets] = values
