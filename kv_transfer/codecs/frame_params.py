"""The parameters blob of a quantised frame: everything that the decoder needs beside the sections and the shape.

Little endian, no gaps::

    codec version u8, mode u8 (0: one section holds the tensor itself; nothing follows. 1: coded)
    flags u16 (bits below), seed u32, first layer u16, first head u16, first token u32
    raw tokens at the start u32, recent tokens u32, raw tokens at the end u32
    protected layers at the start of the frame u16, at its end u16
    section bits u16: section i went through zstd
    rotary base f64: 0 when K's rotary embedding was left as it is
    K, then V: levels - 1 of the classes plain, protected, low 3 x u8; axis u8; group tokens u16;
               of recent tokens levels - 1 u8; axis u8; group tokens u16
"""

import math
import struct
from dataclasses import dataclass
from enum import IntFlag

from kv_transfer.codecs.planes import SegmentRule
from kv_transfer.codecs.spec import CODEC_VERSION, Axis
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason

STORED = bytes((CODEC_VERSION, 0))
NUM_CLASSES = 3
PLAIN, PROTECTED, LOW = range(NUM_CLASSES)

_HEAD = struct.Struct("<BBHIHHIIIIHHHd")
_HALF = struct.Struct("<BBBBHBBH")
_AXES: tuple[Axis, ...] = ("token", "group", "channel", "tensor")
_MAX_THETA = 1e12
_MAX_TOKEN = 1 << 31


class Flag(IntFlag):
    """K's bit; V's is the next higher one."""

    CENTRED = 1 << 0
    ROTATED = 1 << 2
    ASYMMETRIC = 1 << 4
    ASYMMETRIC_RECENT = 1 << 6
    LOW_HEADS = 1 << 8  # of both


_KNOWN_FLAGS = 0x1FF


@dataclass(frozen=True, slots=True)
class HalfParams:
    """Of K or of V. `levels` by class; `recent_levels` in all planes."""

    is_centred: bool
    is_rotated: bool
    levels: tuple[int, ...]
    rule: SegmentRule
    recent_levels: int
    recent_rule: SegmentRule


@dataclass(frozen=True, slots=True)
class FrameParams:
    """Parsed parameters. Counts of tokens and layers are the frame's own."""

    seed: int
    first_layer: int
    first_head: int
    first_token: int
    raw_head: int
    recent: int
    raw_tail: int
    protected_head: int
    protected_tail: int
    has_low_heads: bool
    section_bits: int
    rope_theta: float | None
    halves: tuple[HalfParams, HalfParams]

    def pack(self) -> bytes:
        """Return the blob. Pure."""
        flags = int(Flag.LOW_HEADS) if self.has_low_heads else 0
        halves = b""
        for idx, half in enumerate(self.halves):
            flags |= (Flag.CENTRED << idx) * half.is_centred | (Flag.ROTATED << idx) * half.is_rotated
            flags |= (Flag.ASYMMETRIC << idx) * (not half.rule.is_symmetric)
            flags |= (Flag.ASYMMETRIC_RECENT << idx) * (not half.recent_rule.is_symmetric)
            halves += _HALF.pack(
                *(levels - 1 for levels in half.levels),
                _AXES.index(half.rule.axis),
                half.rule.group_tokens,
                half.recent_levels - 1,
                _AXES.index(half.recent_rule.axis),
                half.recent_rule.group_tokens,
            )
        head = _HEAD.pack(
            CODEC_VERSION,
            1,
            flags,
            self.seed,
            self.first_layer,
            self.first_head,
            self.first_token,
            self.raw_head,
            self.recent,
            self.raw_tail,
            self.protected_head,
            self.protected_tail,
            self.section_bits,
            self.rope_theta or 0.0,
        )
        return head + halves


def unpack(blob: bytes) -> FrameParams:
    """Read the blob of a coded frame. Pure.

    Raises:
        FrameRefused: CODEC: another version, or not such a blob.
    """
    if len(blob) != _HEAD.size + 2 * _HALF.size:
        raise FrameRefused(NackReason.CODEC, f"parameters of {len(blob)} bytes")
    fields = _HEAD.unpack_from(blob)
    version, mode, flags, seed, layer, head, token, raw_head, recent, raw_tail, first, last, bits, theta = fields
    if version != CODEC_VERSION or mode != 1:
        raise FrameRefused(NackReason.CODEC, f"codec version {version}, mode {mode}")
    if flags & ~_KNOWN_FLAGS:
        raise FrameRefused(NackReason.CODEC, f"flags {flags:#x}")
    if token >= _MAX_TOKEN or not (theta == 0.0 or (math.isfinite(theta) and 1.0 < theta <= _MAX_THETA)):
        raise FrameRefused(NackReason.CODEC, f"rotary base {theta}, token {token}")
    return FrameParams(
        seed=seed,
        first_layer=layer,
        first_head=head,
        first_token=token,
        raw_head=raw_head,
        recent=recent,
        raw_tail=raw_tail,
        protected_head=first,
        protected_tail=last,
        has_low_heads=bool(flags & Flag.LOW_HEADS),
        section_bits=bits,
        rope_theta=theta or None,
        halves=(_half(blob, flags, 0), _half(blob, flags, 1)),
    )


def _half(blob: bytes, flags: int, idx: int) -> HalfParams:
    *levels, axis, group, recent_levels, recent_axis, recent_group = _HALF.unpack_from(
        blob, _HEAD.size + idx * _HALF.size
    )
    if max(axis, recent_axis) >= len(_AXES) or 0 in (group, recent_group, recent_levels, *levels):
        raise FrameRefused(NackReason.CODEC, "an unknown axis, an empty group, or less than two levels")
    return HalfParams(
        is_centred=bool(flags & Flag.CENTRED << idx),
        is_rotated=bool(flags & Flag.ROTATED << idx),
        levels=tuple(level + 1 for level in levels),
        rule=SegmentRule(_AXES[axis], group, not flags & Flag.ASYMMETRIC << idx),
        recent_levels=recent_levels + 1,
        recent_rule=SegmentRule(_AXES[recent_axis], recent_group, not flags & Flag.ASYMMETRIC_RECENT << idx),
    )
