"""What the arithmetic of the quantised codec works on: one half (K or V) of a frame, how it is coded, what it becomes.

A plane is one (layer, head) of a half: tokens by channels. Its coded tokens are cut into segments (the most recent
tokens may have levels of their own). The arithmetic exists twice, in `reference` and in `kernels`, behind these shapes:
P planes, T tokens, D channels, G segments.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.codecs.spec import Axis

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I8 = npt.NDArray[np.int8]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SegmentRule:
    """How a segment is coded: what does not vary over its planes."""

    axis: Axis
    group_tokens: int
    is_symmetric: bool
    has_step_rms: bool = False  # the encoder's own


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one rule.

    Attributes:
        start, stop: tokens of the frame.
        levels: of each plane ``[P]``.
        factors: of each plane ``[P]``, the encoder's own: what a plane's spread is multiplied by to give its step.
        symbols_at, scales_at: where each plane's bytes begin in `HalfCodes` ``[P]``.
    """

    start: int
    stop: int
    rule: SegmentRule
    levels: I64
    factors: F32
    symbols_at: I64
    scales_at: I64

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class HalfPlan:
    """One half of a frame.

    Attributes:
        planes_at: of each plane ``[P]``, its place among the ``[L * 2 * K]`` planes of the tensor.
        start, stop: coded tokens; the segments lie in it, in order, without gaps.
        signs: +1 or -1 ``[P, D]``; None: not rotated.
        cos, sin: of the rotary embedding ``[stop - start, D // 2]``; None: left as it is.
        num_symbols, num_scales: of `HalfCodes`.
    """

    planes_at: I64
    start: int
    stop: int
    head_dim: int
    is_centred: bool
    signs: F32 | None
    rope: tuple[F32, F32] | None
    segments: tuple[Segment, ...]
    num_symbols: int
    num_scales: int

    @property
    def num_planes(self) -> int:
        return len(self.planes_at)

    @property
    def num_mins(self) -> int:
        return 0 if all(segment.rule.is_symmetric for segment in self.segments) else self.num_scales


@dataclass(frozen=True, slots=True)
class HalfCodes:
    """A coded half.

    Attributes:
        mean_steps: bfloat16 bits ``[P]``; mean_codes: ``[P, D]``. Zeros unless centred.
        bases: ``[G, P]``. scales: a step is the float32 whose bits are ``(base + scale) << 19``.
        mins: bfloat16 bits, one beside each scale; empty when all segments are symmetric.
        symbols: of a plane of a segment, a row of n bytes per token: byte i holds ``sum(q[j * n + i] * levels ** j)``,
            where `digits_per_byte` say how many digits there are, and ``n = ceil(D / digits)``; digits past the last
            channel are 0. Digits of one token, because tokens recur, and zstd finds equal rows.
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


def plane_scales(rule: SegmentRule, num_tokens: int, head_dim: int) -> int:
    """Return how many scales one plane of a segment has. Pure."""
    if rule.axis == "token":
        return num_tokens
    if rule.axis == "group":
        return -(-num_tokens // rule.group_tokens) * head_dim
    return head_dim if rule.axis == "channel" else 1


def plane_symbols(levels: int, num_tokens: int, head_dim: int) -> int:
    """Return how many bytes of digits one plane of a segment has. Pure."""
    return num_tokens * -(-head_dim // digits_per_byte(levels))


def split(codes: HalfCodes, segment: Segment, plane: int, head_dim: int) -> tuple[U8, U16, U8]:
    """Return the scales, least values and symbols of one plane of a segment. Pure; views."""
    num_scales = plane_scales(segment.rule, segment.num_tokens, head_dim)
    num_symbols = plane_symbols(int(segment.levels[plane]), segment.num_tokens, head_dim)
    scales_at, symbols_at = int(segment.scales_at[plane]), int(segment.symbols_at[plane])
    num_mins = 0 if segment.rule.is_symmetric else num_scales
    return (
        codes.scales[scales_at : scales_at + num_scales],
        codes.mins[scales_at : scales_at + num_mins],
        codes.symbols[symbols_at : symbols_at + num_symbols],
    )
