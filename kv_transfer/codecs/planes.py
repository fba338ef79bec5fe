"""What the arithmetic of the quantised codec works on: planes, the rule for them, and what they become.

A plane is one (layer, K or V, head) of a frame: tokens by channels. The arithmetic exists twice (`reference`,
`kernels`), behind these shapes; P planes, T coded tokens, D channels, S scales per plane, G groups of digits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.codecs.spec import Axis, Order

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I8 = npt.NDArray[np.int8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PlaneRule:
    """How planes are coded. `clip` and `step_rms` matter to the encoder only."""

    levels: int
    axis: Axis
    group_tokens: int
    is_symmetric: bool
    order: Order
    is_centred: bool
    is_rotated: bool
    clip: float = 1.0
    step_rms: float | None = None

    @property
    def digits(self) -> int:
        """Digits of one byte: the most that fit."""
        return digits_per_byte(self.levels)

    def num_scales(self, num_tokens: int, head_dim: int) -> int:
        """Scales of one plane."""
        if self.axis == "token":
            return num_tokens
        if self.axis == "group":
            return -(-num_tokens // self.group_tokens) * head_dim
        return head_dim if self.axis == "channel" else 1

    def num_symbols(self, num_tokens: int, head_dim: int) -> int:
        """Bytes of digits of one plane."""
        return -(-num_tokens // self.digits) * head_dim


@dataclass(frozen=True, slots=True)
class CodedPlanes:
    """P planes of one rule.

    Attributes:
        mean_steps: bfloat16 bits ``[P]``; mean_codes: ``[P, D]``. Zeros unless centred.
        bases: ``[P]`` and scales ``[P, S]``: a step is the float32 whose bits are ``(base + scale) << 19``.
        mins: bfloat16 bits ``[P, S]``; ``[P, 0]`` when symmetric.
        symbols: ``[P, G * D]``: byte (g, d) holds digits ``sum(q[g * digits + j, d] * levels ** j)``.
    """

    mean_steps: U16
    mean_codes: I8
    bases: U16
    scales: U8
    mins: U16
    symbols: U8


def digits_per_byte(levels: int) -> int:
    """Return how many base-`levels` digits fit into a byte. Pure."""
    digits, capacity = 1, levels
    while capacity * levels <= 256:
        digits, capacity = digits + 1, capacity * levels
    return digits
