"""Signs and sizes of the random Hadamard transform: what encoder and decoder derive from the seed alone.

head_dim is split into descending powers of two (80 = 64 + 16), each part is transformed on its own. With ``mix`` the
finaliser of MurmurHash3 and C = 0x9E3779B9, all modulo 2**32::

    key = mix(mix(mix(seed + C) ^ (layer + C)) ^ (head + C))
    sign of channel d = -1 when the top bit of mix(key + (d + 1) * C) is set, else +1

K and V of a head share their signs.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_C = np.uint64(0x9E3779B9)
_MASK = np.uint64(0xFFFFFFFF)


def parts(head_dim: int) -> tuple[int, ...]:
    """Return the sizes of the transforms, descending powers of two that add up to head_dim. Pure."""
    return tuple(1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1)


@lru_cache(maxsize=64)
def signs(
    seed: int, first_layer: int, num_layers: int, first_head: int, num_heads: int, head_dim: int
) -> npt.NDArray[np.float32]:
    """Return +1 and -1, float32 ``[layers * heads, head_dim]``, read-only. Pure."""
    layer = np.arange(first_layer, first_layer + num_layers, dtype=np.uint64)[:, None, None]
    head = np.arange(first_head, first_head + num_heads, dtype=np.uint64)[None, :, None]
    channel = np.arange(1, head_dim + 1, dtype=np.uint64)[None, None, :]
    key = _mix(np.array([[[seed]]], dtype=np.uint64) + _C)
    key = _mix(_mix(key ^ (layer + _C & _MASK)) ^ (head + _C & _MASK))
    top = _mix(key + channel * _C) >> np.uint64(31)
    drawn = np.where(top == 1, np.float32(-1), np.float32(1)).reshape(num_layers * num_heads, head_dim)
    drawn.setflags(write=False)
    return drawn


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = word & _MASK
    word = (word ^ word >> np.uint64(16)) * np.uint64(0x85EBCA6B) & _MASK
    word = (word ^ word >> np.uint64(13)) * np.uint64(0xC2B2AE35) & _MASK
    return word ^ word >> np.uint64(16)
