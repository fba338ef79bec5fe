"""From parameters and shape to the plan of a frame: which section holds what, how long it is, who codes it how.

Both sides derive it, the encoder from its spec and the decoder from the blob, so that every length is known before a
section is looked at. Sections (an empty one has no bytes; bits of the parameters say which went through zstd)::

    0         raw tokens ``[layers, 2, heads, raw_head + raw_tail, D]``
    1         bitmap of low heads; of K and V, when centred: mean steps u16 ``[planes]``, mean codes i8 ``[planes, D]``;
              of K and V: bases u16 ``[segments, planes]``
    2, 3      of K, V: scales u8; when there are asymmetric segments, least values u16
    4 .. 11   symbols u8 of K plain, protected, low, recent; of V plain, protected, low, recent
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.codecs.frame_params import LOW, NUM_CLASSES, PLAIN, PROTECTED, FrameParams, HalfParams
from kv_transfer.codecs.planes import F32, U8, HalfPlan, Segment, SegmentRule, plane_scales, plane_symbols
from kv_transfer.codecs.rotary import rope_tables
from kv_transfer.codecs.rotation import signs
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason

RAW_SECTION, META_SECTION, SCALES_SECTION, SYMBOLS_SECTION = 0, 1, 2, 4
SYMBOLS_PER_HALF = NUM_CLASSES + 1
NUM_SECTIONS = SYMBOLS_SECTION + 2 * SYMBOLS_PER_HALF
HALVES = range(2)  # K, V
MAX_HEAD_DIM = 2047  # the butterflies go up to 1024


@dataclass(frozen=True, slots=True)
class FrameShape:
    """Extents of a frame."""

    layers: int
    heads: int
    tokens: int
    head_dim: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> "FrameShape":
        layers, _, heads, tokens, head_dim = shape
        return cls(layers, heads, tokens, head_dim)

    @property
    def planes(self) -> int:
        return self.layers * self.heads


@dataclass(frozen=True, slots=True)
class Factors:
    """The encoder's own: what spreads are multiplied by to give steps, of each class and of recent tokens.

    Attributes:
        by_plane: further factors, of each plane of the frame ``[P]``; None: 1.
    """

    by_class: tuple[float, ...]
    recent: float
    has_step_rms: bool
    recent_has_step_rms: bool
    by_plane: F32 | None = None


_NO_FACTORS = Factors((0.0,) * NUM_CLASSES, 0.0, has_step_rms=False, recent_has_step_rms=False)


def check_counts(params: FrameParams, shape: FrameShape) -> None:
    """Refuse parameters that do not fit the shape. Pure.

    Raises:
        FrameRefused: CODEC.
    """
    if params.raw_head + params.recent + params.raw_tail > shape.tokens:
        raise FrameRefused(NackReason.CODEC, "more raw and recent tokens than there are")
    if params.raw_head + params.raw_tail == shape.tokens:
        raise FrameRefused(NackReason.CODEC, "nothing is coded")
    if params.protected_head + params.protected_tail > shape.layers:
        raise FrameRefused(NackReason.CODEC, "more protected layers than there are")
    if shape.head_dim > MAX_HEAD_DIM:
        raise FrameRefused(NackReason.CODEC, f"head_dim {shape.head_dim}")
    if params.rope_theta is not None and shape.head_dim % 2:
        raise FrameRefused(NackReason.CODEC, "a rotary embedding of an odd head_dim")


def classes_of(params: FrameParams, shape: FrameShape, low: U8) -> U8:
    """Return the class of every plane of a half. Pure."""
    classes = np.where(low, LOW, PLAIN).astype(np.uint8).reshape(shape.layers, shape.heads)
    classes[: params.protected_head] = PROTECTED
    classes[shape.layers - params.protected_tail :] = PROTECTED
    return classes.reshape(-1)


def meta_bytes(params: FrameParams, shape: FrameShape) -> int:
    """Return the length of the meta section. Pure."""
    bitmap = -(-shape.planes // 8) if params.has_low_heads else 0
    means = sum(half.is_centred for half in params.halves) * shape.planes * (2 + shape.head_dim)
    return bitmap + means + 2 * 2 * _num_segments(params, shape) * shape.planes


def raw_bytes(params: FrameParams, shape: FrameShape, itemsize: int) -> int:
    """Return the length of the section of raw tokens. Pure."""
    return 2 * shape.planes * (params.raw_head + params.raw_tail) * shape.head_dim * itemsize


def plan_half(
    params: FrameParams, shape: FrameShape, idx: int, classes: U8, factors: Factors = _NO_FACTORS
) -> tuple[HalfPlan, tuple[int, ...]]:
    """Return the plan of K (0) or V (1), and the lengths of its `SYMBOLS_PER_HALF` sections of symbols. Pure."""
    half = params.halves[idx]
    start, stop = params.raw_head, shape.tokens - params.raw_tail
    body_stop = stop - params.recent
    levels = np.array(half.levels, dtype=np.int64)[classes]
    by_plane = np.ones(shape.planes, dtype=np.float32) if factors.by_plane is None else factors.by_plane
    segments: list[Segment] = []
    lengths = [0] * SYMBOLS_PER_HALF
    num_scales = 0
    if body_stop > start:
        symbols_at = np.zeros(shape.planes, dtype=np.int64)
        at = 0
        for cls in range(NUM_CLASSES):
            members = np.flatnonzero(classes == cls)
            each = plane_symbols(half.levels[cls], body_stop - start, shape.head_dim)
            symbols_at[members] = at + each * np.arange(members.size)
            lengths[cls] = each * members.size
            at += lengths[cls]
        of_class = np.array(factors.by_class, dtype=np.float32)[classes] * by_plane
        rule = _with_rms(half.rule, factors.has_step_rms)
        segments.append(_segment(start, body_stop, rule, levels, of_class, symbols_at, 0, shape))
        num_scales += shape.planes * plane_scales(rule, body_stop - start, shape.head_dim)
    if params.recent:
        each = plane_symbols(half.recent_levels, params.recent, shape.head_dim)
        symbols_at = sum(lengths) + each * np.arange(shape.planes, dtype=np.int64)
        lengths[NUM_CLASSES] = each * shape.planes
        levels = np.full(shape.planes, half.recent_levels, dtype=np.int64)
        same = np.full(shape.planes, factors.recent, dtype=np.float32) * by_plane
        rule = _with_rms(half.recent_rule, factors.recent_has_step_rms)
        segments.append(_segment(body_stop, stop, rule, levels, same, symbols_at, num_scales, shape))
        num_scales += shape.planes * plane_scales(rule, params.recent, shape.head_dim)
    layer, head = np.divmod(np.arange(shape.planes, dtype=np.int64), shape.heads)
    plan = HalfPlan(
        planes_at=(2 * layer + idx) * shape.heads + head,
        start=start,
        stop=stop,
        head_dim=shape.head_dim,
        is_centred=half.is_centred,
        signs=_signs(params, shape, half),
        rope=_rope(params, shape, idx),
        segments=tuple(segments),
        num_symbols=sum(lengths),
        num_scales=num_scales,
    )
    return plan, tuple(lengths)


def _segment(
    start: int,
    stop: int,
    rule: SegmentRule,
    levels: np.ndarray,
    factors: F32,
    symbols_at: np.ndarray,
    scales_from: int,
    shape: FrameShape,
) -> Segment:
    each = plane_scales(rule, stop - start, shape.head_dim)
    scales_at = scales_from + each * np.arange(shape.planes, dtype=np.int64)
    return Segment(start, stop, rule, levels, factors, symbols_at, scales_at)


def _with_rms(rule: SegmentRule, has_step_rms: bool) -> SegmentRule:
    return SegmentRule(rule.axis, rule.group_tokens, rule.is_symmetric, has_step_rms)


def _num_segments(params: FrameParams, shape: FrameShape) -> int:
    body = shape.tokens - params.raw_head - params.recent - params.raw_tail
    return int(body > 0) + int(params.recent > 0)


def _signs(params: FrameParams, shape: FrameShape, half: HalfParams) -> F32 | None:
    if not half.is_rotated:
        return None
    return signs(params.seed, params.first_layer, shape.layers, params.first_head, shape.heads, shape.head_dim)


def _rope(params: FrameParams, shape: FrameShape, idx: int) -> tuple[F32, F32] | None:
    if params.rope_theta is None or idx == 1:
        return None
    num_tokens = shape.tokens - params.raw_head - params.raw_tail
    return rope_tables(params.rope_theta, shape.head_dim, params.first_token, num_tokens)
