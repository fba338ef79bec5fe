"""Tables of the rotary position embedding, so that it can be undone for the wire.

Channel pairs are (d, d + D/2), the angle of pair d at a position is ``position * theta ** (-2 d / D)``. Computed in
double and rounded once; the arithmetic of the codec takes the tables as they are. They are kept in blocks of positions,
so many at most, because a stranger's frame may name any position.
"""

from functools import lru_cache

import numpy as np

from kv_transfer.codecs.planes import F32

_BLOCK = 512
_MAX_BLOCKS = 256  # 64 MiB at 128 channels: a longer prompt's every frame would push out the next one's tables


def rope_tables(theta: float, head_dim: int, first_token: int, num_tokens: int) -> tuple[F32, F32]:
    """Return cos and sin, float32 ``[num_tokens, head_dim // 2]``. Pure."""
    first = first_token // _BLOCK
    blocks = [_table(theta, head_dim, block) for block in range(first, (first_token + num_tokens - 1) // _BLOCK + 1)]
    skip = first_token - first * _BLOCK
    cos, sin = (np.concatenate([block[half] for block in blocks])[skip : skip + num_tokens] for half in range(2))
    return cos, sin


@lru_cache(maxsize=_MAX_BLOCKS)
def _table(theta: float, head_dim: int, block: int) -> tuple[F32, F32]:
    position = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.float64)
    angle = np.outer(position, theta ** (-np.arange(0, head_dim // 2, dtype=np.float64) * 2 / head_dim))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
