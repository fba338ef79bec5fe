"""Random numbers without state: each is a hash of (seed, position, token id).

The noise at position i of a generation is therefore the same whoever draws it and with whatever batch around it: after
recompute, on another worker, one token at a time or many. Source of the idea: counter-based generators (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11); the mixers are the public-domain splitmix64 of Vigna and a
32-bit multiply-xorshift finaliser with the constants of Wellons' hash prospector.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B
_SIGNED_2 = _MULTIPLY_2 - 2**32  # the same 32 bits as int32
_LARGEST_UNIFORM = 1.0 - 2.0**-24


def mix64(value: int) -> int:
    """Return 64 bits that depend on all 64 bits of `value` (splitmix64's finaliser). Pure."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def position_key(mixed_seed: int, position: int) -> int:
    """Return the 64-bit key of one position. Pure.

    Args:
        mixed_seed: `mix64` of the request's seed; kept by the caller because it never changes.
        position: index of the generated token, from 0.
    """
    return mix64((mixed_seed + position * _GOLDEN) & _MASK64)


def mix32(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hash every element to 32 bits. Pure."""
    mixed: NDArray[np.uint32] = values ^ (values >> np.uint32(16))
    mixed = mixed * np.uint32(_MULTIPLY_1)
    mixed = mixed ^ (mixed >> np.uint32(15))
    mixed = mixed * np.uint32(_MULTIPLY_2)
    mixed ^= mixed >> np.uint32(16)
    return mixed


class TokenNoise:
    """Exponentially distributed noise per token of a vocabulary.

    One finaliser per number: token ids are hashed once into a table, a number is the finaliser of (table entry + low
    half of the key), with the high half added between its two multiplications.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        table = mix32(np.arange(1, vocab_size + 1, dtype=np.uint32))
        self._table = torch.from_numpy(table.view(np.int32)).to(device)

    def exponentials(self, keys: Sequence[int], token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return one Exp(1) number per row and token, > 0.

        Args:
            keys: `position_key` of each of R rows.
            token_ids: int64 [R, C]; None for the whole vocabulary in order.
        Returns:
            float32 [R, C] or [R, V]; the caller owns it.
        """
        halves = np.array(keys, np.uint64).view(np.int32).reshape(-1, 2)  # little-endian: low half first
        halves_here = torch.from_numpy(halves).to(self._table.device)
        low, high = halves_here[:, :1], halves_here[:, 1:]
        bits = (self._table if token_ids is None else self._table[token_ids]) + low
        shifted = bits >> 16  # arithmetic on int32: the mask makes it logical
        bits ^= shifted.bitwise_and_(0xFFFF)
        bits *= _MULTIPLY_1
        torch.bitwise_right_shift(bits, 15, out=shifted)
        bits ^= shifted.bitwise_and_(0x1FFFF)
        bits += high
        bits *= _SIGNED_2
        bits &= 0x7FFFFFFF
        # u in (0, 1) is finest near 0, where the race is decided: small exponentials win.
        uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_UNIFORM)
        noise: torch.Tensor = uniform.neg_().log1p_().neg_()
        return noise
