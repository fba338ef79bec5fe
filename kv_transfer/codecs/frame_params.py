"""The parameters blob of a quantised frame: everything that the decoder needs beside the sections and the shape.

Little endian, no gaps::

    codec version u8, mode u8 (0: one section holds the tensor itself; nothing follows. 1: coded)
    flags u16 (bits below), seed u32, first layer u16, first head u16
    raw tokens at the start u32, raw tokens at the end u32
    protected layers at the start of the frame u16, at its end u16
    section bits u16: section i went through zstd
    K, then V: levels - 1 of the classes plain, protected, low 3 x u8; axis u8; group tokens u16
"""

import struct
from dataclasses import dataclass
from enum import IntFlag

from kv_transfer.codecs.planes import PlaneRule
from kv_transfer.codecs.spec import CODEC_VERSION, Axis
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason

STORED = bytes((CODEC_VERSION, 0))
NUM_CLASSES = 3
PLAIN, PROTECTED, LOW = range(NUM_CLASSES)

_HEAD = struct.Struct("<BBHIHHIIHHH")
_HALF = struct.Struct("<BBBBH")
_AXES: tuple[Axis, ...] = ("token", "group", "channel", "tensor")


class Flag(IntFlag):
    """K's bit; V's is the next higher one."""

    CENTRED = 1 << 0
    ROTATED = 1 << 2
    ASYMMETRIC = 1 << 4
    CHANNEL_ORDER = 1 << 6
    LOW_HEADS = 1 << 8  # of both


_KNOWN_FLAGS = 0x1FF


@dataclass(frozen=True, slots=True)
class FrameParams:
    """Parsed parameters. `rules[half][cls]`, half 0 is K and 1 is V."""

    seed: int
    first_layer: int
    first_head: int
    raw_head: int
    raw_tail: int
    protected_head: int
    protected_tail: int
    has_low_heads: bool
    section_bits: int
    rules: tuple[tuple[PlaneRule, ...], ...]

    def pack(self) -> bytes:
        """Return the blob. Pure."""
        flags = int(Flag.LOW_HEADS) if self.has_low_heads else 0
        halves = b""
        for half, classes in enumerate(self.rules):
            rule = classes[PLAIN]
            flags |= (Flag.CENTRED << half) * rule.is_centred | (Flag.ROTATED << half) * rule.is_rotated
            flags |= (Flag.ASYMMETRIC << half) * (not rule.is_symmetric)
            flags |= (Flag.CHANNEL_ORDER << half) * (rule.order == "channel")
            levels = (cls.levels - 1 for cls in classes)
            halves += _HALF.pack(*levels, _AXES.index(rule.axis), rule.group_tokens)
        return (
            _HEAD.pack(
                CODEC_VERSION,
                1,
                flags,
                self.seed,
                self.first_layer,
                self.first_head,
                self.raw_head,
                self.raw_tail,
                self.protected_head,
                self.protected_tail,
                self.section_bits,
            )
            + halves
        )


def unpack(blob: bytes) -> FrameParams:
    """Read the blob of a coded frame. Pure.

    Raises:
        FrameRefused: CODEC: another version, or not such a blob.
    """
    if len(blob) != _HEAD.size + 2 * _HALF.size:
        raise FrameRefused(NackReason.CODEC, f"parameters of {len(blob)} bytes")
    version, mode, flags, seed, layer, head, raw_head, raw_tail, first, last, bits = _HEAD.unpack_from(blob)
    if version != CODEC_VERSION or mode != 1:
        raise FrameRefused(NackReason.CODEC, f"codec version {version}, mode {mode}")
    if flags & ~_KNOWN_FLAGS:
        raise FrameRefused(NackReason.CODEC, f"flags {flags:#x}")
    rules = []
    for half in range(2):
        *levels, axis, group_tokens = _HALF.unpack_from(blob, _HEAD.size + half * _HALF.size)
        if axis >= len(_AXES) or group_tokens == 0 or 0 in levels:
            raise FrameRefused(NackReason.CODEC, "an unknown axis, an empty group, or less than two levels")
        rules.append(
            tuple(
                PlaneRule(
                    levels=level + 1,
                    axis=_AXES[axis],
                    group_tokens=group_tokens,
                    is_symmetric=not flags & Flag.ASYMMETRIC << half,
                    order="channel" if flags & Flag.CHANNEL_ORDER << half else "token",
                    is_centred=bool(flags & Flag.CENTRED << half),
                    is_rotated=bool(flags & Flag.ROTATED << half),
                )
                for level in levels
            )
        )
    return FrameParams(
        seed=seed,
        first_layer=layer,
        first_head=head,
        raw_head=raw_head,
        raw_tail=raw_tail,
        protected_head=first,
        protected_tail=last,
        has_low_heads=bool(flags & Flag.LOW_HEADS),
        section_bits=bits,
        rules=tuple(rules),
    )
