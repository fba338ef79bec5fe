"""Codec 2: the full pipeline. A frame is coded on its own; what would not be smaller is stored as it is.

`frame_plan` says what the sections are; here they are filled, squeezed, opened and verified.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from kv_transfer.codec import RAW, Encoded, FramePlace
from kv_transfer.codecs import reference, triton_quantise
from kv_transfer.codecs.entropy import expand, squeeze
from kv_transfer.codecs.frame_params import STORED, FrameParams, HalfParams, unpack
from kv_transfer.codecs.frame_plan import (
    HALVES,
    META_SECTION,
    NUM_SECTIONS,
    RAW_SECTION,
    SCALES_SECTION,
    SYMBOLS_PER_HALF,
    SYMBOLS_SECTION,
    Factors,
    FrameShape,
    check_counts,
    classes_of,
    meta_bytes,
    plan_half,
    raw_bytes,
)
from kv_transfer.codecs.planes import U8, U16, HalfCodes, HalfPlan, SegmentRule
from kv_transfer.codecs.reference import LAST_BFLOAT16, LAST_WORD
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.frame import FrameRefused, section_spans
from kv_transfer.session import NackReason

_HOST = torch.device("cpu")


class QuantisedEncoder:
    """Of one spec."""

    codec_id = 2
    is_identity = False
    is_lossless = False

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec
        self._low_heads = frozenset(spec.low_heads)
        k, v = _half_params(spec)
        self._halves = (k, v)
        self._factors = (
            _factors(spec.k, spec.k_recent, k, (spec.k_protected_step_rms, spec.k_low_step_rms)),
            _factors(spec.v, spec.v_recent, v, (spec.v_protected_step_rms, spec.v_low_step_rms)),
        )

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        num_bytes = kv.numel() * kv.element_size()
        if kv.is_cuda and not triton_quantise.can_code(kv):
            kv = kv.cpu()
        coded = self._sections(kv, place)
        if coded is not None:
            params, sections = coded
            lengths = tuple(section.size for section in sections)
            spans = section_spans(lengths)
            if spans[-1].stop < num_bytes:
                target = payload.numpy()
                for span, section in zip(spans, sections, strict=True):
                    target[span.start : span.stop] = section
                return Encoded(params, lengths)
        return Encoded(STORED, RAW.encode(kv, payload, place).section_bytes)

    def _sections(self, kv: Tensor, place: FramePlace) -> tuple[bytes, list[U8]] | None:
        shape = FrameShape.of(kv.shape)
        params = self._params(place, shape)
        stop = shape.tokens - params.raw_tail
        if stop <= params.raw_head:
            return None
        low = self._low_map(place)
        classes = classes_of(params, shape, low)
        planes = kv.view(-1, shape.tokens, shape.head_dim)
        means: list[bytes] = []
        bases: list[bytes] = []
        scales: list[U8] = []
        symbols: list[U8] = []
        for half in HALVES:
            plan, lengths = plan_half(params, shape, half, classes, self._factors_of(half, place))
            codes = _arithmetic_for(kv).encode(planes, plan)
            if codes is None:
                return None
            if plan.is_centred:
                means += [codes.mean_steps.tobytes(), codes.mean_codes.tobytes()]
            bases.append(codes.bases.tobytes())
            scales.append(np.concatenate([codes.scales, codes.mins.view(np.uint8)]))
            symbols += np.split(codes.symbols, np.cumsum(lengths)[:-1])
        bitmap = np.packbits(low).tobytes() if params.has_low_heads else b""
        meta = np.frombuffer(b"".join((bitmap, *means, *bases)), dtype=np.uint8)
        raw = torch.cat([kv[:, :, :, : params.raw_head], kv[:, :, :, stop:]], dim=3)
        counts = [*np.bincount(classes, minlength=SYMBOLS_PER_HALF - 1).tolist(), shape.planes]
        return self._squeezed(
            params, [raw.reshape(-1).view(torch.uint8).cpu().numpy(), meta, *scales, *symbols], counts
        )

    def _squeezed(self, params: FrameParams, sections: list[U8], counts: list[int]) -> tuple[bytes, list[U8]]:
        """Args: counts: planes of each section of symbols of a half."""
        bits = 0
        if self._spec.entropy == "zstd":
            for idx in range(META_SECTION, len(sections)):
                half, which = divmod(idx - SYMBOLS_SECTION, SYMBOLS_PER_HALF)
                # Planes of unequal steps are unlike each other; of those of equal steps one code table is smaller.
                is_cut = half >= 0 and (self._spec.k_plane_steps, self._spec.v_plane_steps)[half] and counts[which]
                block_bytes = sections[idx].size // counts[which] if is_cut else None
                squeezed = squeeze(sections[idx], self._spec.zstd_level, block_bytes)
                if squeezed is not None:
                    bits |= 1 << idx
                    sections[idx] = np.frombuffer(squeezed, dtype=np.uint8)
        return replace(params, section_bits=bits).pack(), sections

    def _params(self, place: FramePlace, shape: FrameShape) -> FrameParams:
        spec, tokens, layers, heads = self._spec, place.box.tokens, place.box.layers, place.box.heads
        raw_head = min(max(spec.sink_tokens - tokens.start, 0), shape.tokens)
        raw_tail = min(max(tokens.stop - max(place.num_tokens - spec.tail_tokens, 0), 0), shape.tokens - raw_head)
        recent_from = max(place.num_tokens - spec.tail_tokens - spec.recent_tokens, 0)
        recent = min(max(tokens.stop - recent_from, 0), shape.tokens - raw_head) - raw_tail
        first = min(max(spec.protected_first - layers.start, 0), shape.layers)
        last = min(max(layers.stop - max(place.num_layers - spec.protected_last, 0), 0), shape.layers - first)
        return FrameParams(
            seed=spec.seed,
            first_layer=layers.start,
            first_head=heads.start,
            first_token=tokens.start + raw_head,
            raw_head=raw_head,
            recent=recent,
            raw_tail=raw_tail,
            protected_head=first,
            protected_tail=last,
            has_low_heads=any(layer in layers and head in heads for layer, head in self._low_heads),
            section_bits=0,
            rope_theta=None if shape.head_dim % 2 else spec.rope_theta,
            halves=self._halves,
        )

    def _factors_of(self, half: int, place: FramePlace) -> Factors:
        """Return the factors of a frame.

        Raises:
            ConfigError: there are steps of planes, of a smaller model.
        """
        steps = (self._spec.k_plane_steps, self._spec.v_plane_steps)[half]
        if not steps:
            return self._factors[half]
        if len(steps) < place.num_layers or min(map(len, steps)) < place.num_heads:
            raise ConfigError(f"plane steps are of {len(steps)} layers, the model has {place.num_layers}")
        box = place.box
        by_plane = [steps[layer][head] for layer in box.layers for head in box.heads]
        return replace(self._factors[half], by_plane=np.array(by_plane, dtype=np.float32))

    def _low_map(self, place: FramePlace) -> U8:
        pairs = [(layer, head) for layer in place.box.layers for head in place.box.heads]
        return np.array([pair in self._low_heads for pair in pairs], dtype=np.uint8)


class QuantisedDecoder:
    """Of every spec. What it gives lies on `device`; where that cannot decode, in host memory."""

    codec_id = 2
    name = "quantised"

    def __init__(self, device: torch.device = _HOST) -> None:
        self._device = device

    def is_exact(self, params: bytes) -> bool:
        return params == STORED

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if params == STORED:
            return RAW.decode(b"", sections, shape, dtype)
        parsed = unpack(params)
        extents = FrameShape.of(shape)
        check_counts(parsed, extents)
        if len(sections) != NUM_SECTIONS or parsed.section_bits >> NUM_SECTIONS or parsed.section_bits & 1:
            raise FrameRefused(NackReason.LENGTH, f"{len(sections)} sections, or a wrong bit for one")
        return _Reading(parsed, sections, extents, dtype, self._device).decode()


class _Reading:
    """One frame that is being decoded."""

    def __init__(
        self,
        params: FrameParams,
        sections: Sequence[Tensor],
        shape: FrameShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._device = device
        self._params = params
        self._sections = sections
        self._shape = shape
        self._dtype = dtype

    def decode(self) -> Tensor:
        params, shape = self._params, self._shape
        meta = _Cursor(self._section(META_SECTION, meta_bytes(params, shape)))
        low = np.zeros(shape.planes, dtype=np.uint8)
        if params.has_low_heads:
            low = np.unpackbits(meta.take(-(-shape.planes // 8)))[: shape.planes]
        classes = classes_of(params, shape, low)
        means = [self._take_means(meta, half) for half in params.halves]
        raw = self._section(RAW_SECTION, raw_bytes(params, shape, self._dtype.itemsize))
        extents = (shape.layers, 2, shape.heads, shape.tokens, shape.head_dim)
        device = self._device if triton_quantise.can_code_on(self._device, shape.head_dim) else _HOST
        kv = torch.empty(extents, dtype=self._dtype, device=device)
        for idx in HALVES:
            plan, lengths = plan_half(params, shape, idx, classes)
            codes = self._codes(meta, plan, lengths, idx, means[idx])
            if not _arithmetic_for(kv).decode(codes, plan, kv.view(-1, shape.tokens, shape.head_dim)):
                raise FrameRefused(NackReason.CODEC, "a digit that is not a level")
        self._fill_raw(kv, raw)
        return kv

    def _codes(
        self, meta: "_Cursor", plan: HalfPlan, lengths: tuple[int, ...], idx: int, means: tuple[U16, np.ndarray]
    ) -> HalfCodes:
        bases = meta.take(2 * len(plan.segments) * plan.num_planes).view(np.uint16)
        held = _Cursor(self._section(SCALES_SECTION + idx, plan.num_scales + 2 * plan.num_mins))
        scales = held.take(plan.num_scales)
        mins = held.take(2 * plan.num_mins).view(np.uint16)
        if int(bases.max()) + 255 >= LAST_WORD or _is_too_large(mins):
            raise FrameRefused(NackReason.CODEC, "a scale that is not finite")
        first = SYMBOLS_SECTION + idx * SYMBOLS_PER_HALF
        symbols = [self._section(first + at, length) for at, length in enumerate(lengths)]
        return HalfCodes(*means, bases.reshape(len(plan.segments), -1), scales, mins, np.concatenate(symbols))

    def _take_means(self, meta: "_Cursor", half: HalfParams) -> tuple[U16, np.ndarray]:
        shape = self._shape
        if not half.is_centred:
            return np.zeros(shape.planes, np.uint16), np.zeros((shape.planes, shape.head_dim), np.int8)
        steps = meta.take(2 * shape.planes).view(np.uint16)
        if _is_too_large(steps):
            raise FrameRefused(NackReason.CODEC, "a mean that is not finite")
        codes = meta.take(shape.planes * shape.head_dim).view(np.int8)
        return steps, codes.reshape(shape.planes, shape.head_dim)

    def _fill_raw(self, kv: Tensor, raw: U8) -> None:
        head, tail = self._params.raw_head, self._params.raw_tail
        if head + tail:
            rows = torch.from_numpy(raw).view(self._dtype).view(*kv.shape[:3], head + tail, self._shape.head_dim)
            kv[:, :, :, :head] = rows[:, :, :, :head]
            kv[:, :, :, self._shape.tokens - tail :] = rows[:, :, :, head:]

    def _section(self, idx: int, num_bytes: int) -> U8:
        is_squeezed = bool(self._params.section_bits >> idx & 1)
        return expand(self._sections[idx], is_squeezed, num_bytes, f"section {idx}")


class _Cursor:
    """Takes pieces of a section whose length has been checked; each piece is a copy, so aligned for any view."""

    def __init__(self, held: U8) -> None:
        self._held = held
        self._at = 0

    def take(self, num_bytes: int) -> U8:
        self._at += num_bytes
        return self._held[self._at - num_bytes : self._at].copy()


def _arithmetic_for(kv: Tensor) -> ModuleType:
    return triton_quantise if kv.is_cuda else _arithmetic()


def _arithmetic() -> ModuleType:
    """Import numba when the first frame needs it, not when somebody imports `kv_transfer`; without it, be slow."""
    if find_spec("numba") is None:
        return reference
    from kv_transfer.codecs import fused

    return fused


def _is_too_large(bits: U16) -> bool:
    """Tell whether a bfloat16 is larger than any that is coded, or not a number."""
    return bool(((bits & 0x7FFF) >= LAST_BFLOAT16).any())


def _half_params(spec: PipelineSpec) -> tuple[HalfParams, HalfParams]:
    def half(quantiser: Quantiser, recent: Quantiser, others: tuple[int | None, ...], *bools: bool) -> HalfParams:
        return HalfParams(
            is_centred=bools[0],
            is_rotated=bools[1],
            levels=(quantiser.levels, *(levels or quantiser.levels for levels in others)),
            rule=SegmentRule(quantiser.axis, quantiser.group_tokens, quantiser.symmetric),
            recent_levels=recent.levels,
            recent_rule=SegmentRule(recent.axis, recent.group_tokens, recent.symmetric),
        )

    k_others, v_others = (
        (spec.k_protected_levels, spec.k_low_levels),
        (spec.v_protected_levels, spec.v_low_levels),
    )
    return (
        half(spec.k, spec.k_recent or spec.k, k_others, spec.center_k, spec.rotate_k),
        half(spec.v, spec.v_recent or spec.v, v_others, spec.center_v, spec.rotate_v),
    )


def _factors(
    quantiser: Quantiser, recent: Quantiser | None, half: HalfParams, class_steps: tuple[float | None, ...]
) -> Factors:
    steps = (quantiser.step_rms, *(step or quantiser.step_rms for step in class_steps))
    recent = recent or quantiser
    return Factors(
        by_class=tuple(_factor(quantiser, levels, step) for levels, step in zip(half.levels, steps, strict=True)),
        recent=_factor(recent, recent.levels, recent.step_rms),
        has_step_rms=quantiser.step_rms is not None,
        recent_has_step_rms=recent.step_rms is not None,
    )


def _factor(quantiser: Quantiser, levels: int, step_rms: float | None) -> float:
    if step_rms is not None:
        return step_rms
    return (2.0 * quantiser.clip if quantiser.symmetric else 1.0) / (levels - 1)
