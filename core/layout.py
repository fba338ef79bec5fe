"""The shape of a model's KV cache: what two workers must agree on before bytes may cross between them."""

from dataclasses import dataclass
from hashlib import blake2b

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """KV cache geometry of one model, tensor-parallel degree included in nothing: heads are global.

    Attributes:
        weights_version: fingerprint of config and weights; KV of other weights is garbage.
        num_layers, num_kv_heads, head_dim: of the model.
        dtype: a key of `DTYPE_BYTES`.
        block_size: tokens per KV block of THIS worker; peers may differ (frames are keyed by token range).
    """

    weights_version: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def fingerprint(self) -> str:
        """Hash of all that must be equal on both sides of a transfer (the block size need not be)."""
        parts = (self.weights_version, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)
        return blake2b(repr(parts).encode(), digest_size=8).hexdigest()
