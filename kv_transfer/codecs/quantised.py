"""Codec 2: the full pipeline. A frame is coded on its own; what would not be smaller is stored as it is.

Sections of a coded frame (an empty one has no bytes; bits of the parameters say which went through zstd):

    0       raw tokens ``[layers, 2, heads, raw_head + raw_tail, D]``
    1       bitmap of low heads ``[layers * heads]``; then of K and V, when centred, mean steps u16 ``[planes]`` and
            mean codes i8 ``[planes, D]``; then of K and V bases u16 ``[planes]``
    2, 3    scales u8 ``[planes, S]`` of K, of V; asymmetric: then least values u16 ``[planes, S]``
    4 .. 9  symbols u8 ``[planes of the class, G * D]``: K plain, protected, low; V plain, protected, low
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codec import Encoded, FramePlace
from kv_transfer.codecs import reference
from kv_transfer.codecs.entropy import expand, squeeze
from kv_transfer.codecs.frame_params import LOW, NUM_CLASSES, PLAIN, PROTECTED, STORED, FrameParams, unpack
from kv_transfer.codecs.planes import U8, CodedPlanes, PlaneRule
from kv_transfer.codecs.rotation import signs
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.frame import FrameRefused, section_spans
from kv_transfer.session import NackReason

_NUM_SECTIONS = 4 + 2 * NUM_CLASSES
_HALVES = range(2)  # K, V


@dataclass(frozen=True, slots=True)
class _Shape:
    """Extents of one frame: all counts that sections must agree with."""

    layers: int
    heads: int
    tokens: int
    head_dim: int
    coded: int  # tokens that are not raw

    @property
    def planes(self) -> int:
        return self.layers * self.heads


class QuantisedEncoder:
    """Of one spec."""

    codec_id = 2
    is_identity = False
    is_lossless = False

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec
        self._rules = _rules(spec)
        self._low_heads = frozenset(spec.low_heads)

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        raw_bytes = kv.numel() * kv.element_size()
        coded = self._sections(kv, place)
        if coded is not None:
            params, sections = coded
            lengths = tuple(section.size for section in sections)
            spans = section_spans(lengths)
            if spans[-1].stop < raw_bytes:
                target = payload.numpy()
                for span, section in zip(spans, sections, strict=True):
                    target[span.start : span.stop] = section
                return Encoded(params, lengths)
        payload[:raw_bytes].copy_(kv.reshape(-1).view(torch.uint8))
        return Encoded(STORED, (raw_bytes,))

    def _sections(self, kv: Tensor, place: FramePlace) -> tuple[bytes, list[U8]] | None:
        params = self._params(place)
        layers, _, heads, tokens, head_dim = kv.shape
        shape = _Shape(layers, heads, tokens, head_dim, tokens - params.raw_head - params.raw_tail)
        if shape.coded <= 0:
            return None
        low = self._low_map(place)
        classes = _classes(params, shape, low)
        stop = tokens - params.raw_tail
        raw = torch.cat([kv[:, :, :, : params.raw_head], kv[:, :, :, stop:]], dim=3)
        all_signs = signs(params.seed, place.box.layers.start, layers, place.box.heads.start, heads, head_dim)
        meta_means: list[bytes] = []
        meta_bases: list[bytes] = []
        scales: list[U8] = []
        symbols: list[U8] = []
        for half in _HALVES:
            planes = kv[:, half, :, params.raw_head : stop].reshape(-1, shape.coded, head_dim)
            rule = params.rules[half][PLAIN]
            mean_steps = np.zeros(shape.planes, dtype=np.uint16)
            mean_codes = np.zeros((shape.planes, head_dim), dtype=np.int8)
            bases = np.zeros(shape.planes, dtype=np.uint16)
            num_scales = rule.num_scales(shape.coded, head_dim)
            half_scales = np.zeros((shape.planes, num_scales), dtype=np.uint8)
            mins = np.zeros((shape.planes, 0 if rule.is_symmetric else num_scales), dtype=np.uint16)
            for cls in range(NUM_CLASSES):
                chosen = np.flatnonzero(classes == cls)
                if not chosen.size:
                    symbols.append(np.zeros(0, dtype=np.uint8))
                    continue
                coded = reference.encode_planes(planes[chosen], params.rules[half][cls], all_signs[chosen])
                if coded is None:
                    return None
                mean_steps[chosen], mean_codes[chosen] = coded.mean_steps, coded.mean_codes
                bases[chosen], half_scales[chosen], mins[chosen] = coded.bases, coded.scales, coded.mins
                symbols.append(coded.symbols.reshape(-1))
            if rule.is_centred:
                meta_means += [mean_steps.tobytes(), mean_codes.tobytes()]
            meta_bases.append(bases.tobytes())
            scales.append(np.frombuffer(half_scales.tobytes() + mins.tobytes(), dtype=np.uint8))
        bitmap = np.packbits(low).tobytes() if params.has_low_heads else b""
        meta = np.frombuffer(b"".join((bitmap, *meta_means, *meta_bases)), dtype=np.uint8)
        sections = [raw.reshape(-1).view(torch.uint8).numpy(), meta, *scales, *symbols]
        return self._squeezed(params, sections)

    def _squeezed(self, params: FrameParams, sections: list[U8]) -> tuple[bytes, list[U8]]:
        bits = 0
        if self._spec.entropy == "zstd":
            for idx in range(1, len(sections)):
                squeezed = squeeze(sections[idx], self._spec.zstd_level)
                if squeezed is not None:
                    bits |= 1 << idx
                    sections[idx] = np.frombuffer(squeezed, dtype=np.uint8)
        return replace(params, section_bits=bits).pack(), sections

    def _params(self, place: FramePlace) -> FrameParams:
        spec, tokens, layers = self._spec, place.box.tokens, place.box.layers
        raw_head = min(max(spec.sink_tokens - tokens.start, 0), len(tokens))
        raw_tail = min(max(tokens.stop - max(place.num_tokens - spec.tail_tokens, 0), 0), len(tokens) - raw_head)
        first = min(max(spec.protected_first - layers.start, 0), len(layers))
        last = min(max(layers.stop - max(place.num_layers - spec.protected_last, 0), 0), len(layers) - first)
        has_low_heads = any(layer in layers and head in place.box.heads for layer, head in self._low_heads)
        return FrameParams(
            seed=spec.seed,
            first_layer=layers.start,
            first_head=place.box.heads.start,
            raw_head=raw_head,
            raw_tail=raw_tail,
            protected_head=first,
            protected_tail=last,
            has_low_heads=has_low_heads,
            section_bits=0,
            rules=self._rules,
        )

    def _low_map(self, place: FramePlace) -> U8:
        return np.array(
            [(layer, head) in self._low_heads for layer in place.box.layers for head in place.box.heads],
            dtype=np.uint8,
        )


class QuantisedDecoder:
    """Of every spec."""

    codec_id = 2
    name = "quantised"

    def is_exact(self, params: bytes) -> bool:
        return params == STORED

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if params == STORED:
            return _stored(sections, shape, dtype)
        parsed = unpack(params)
        layers, _, heads, tokens, head_dim = shape
        extents = _Shape(layers, heads, tokens, head_dim, tokens - parsed.raw_head - parsed.raw_tail)
        if extents.coded <= 0 or parsed.protected_head + parsed.protected_tail > layers:
            raise FrameRefused(NackReason.CODEC, "more raw tokens or protected layers than there are")
        if len(sections) != _NUM_SECTIONS or parsed.section_bits >> _NUM_SECTIONS or parsed.section_bits & 1:
            raise FrameRefused(NackReason.LENGTH, f"{len(sections)} sections, or a wrong bit for one")
        return _Reading(parsed, sections, extents, dtype).decode()


class _Reading:
    """One frame that is being decoded."""

    def __init__(self, params: FrameParams, sections: Sequence[Tensor], shape: _Shape, dtype: torch.dtype) -> None:
        self._params = params
        self._sections = sections
        self._shape = shape
        self._dtype = dtype

    def decode(self) -> Tensor:
        params, shape = self._params, self._shape
        meta = _Cursor(self._section(1, self._meta_bytes()))
        low = np.zeros(shape.planes, dtype=np.uint8)
        if params.has_low_heads:
            low = np.unpackbits(meta.take(-(-shape.planes // 8)))[: shape.planes]
        classes = _classes(params, shape, low)
        means = [self._take_means(meta, params.rules[half][PLAIN]) for half in _HALVES]
        bases = [meta.take(2 * shape.planes).view(np.uint16) for _ in _HALVES]
        raw_tokens = params.raw_head + params.raw_tail
        raw_bytes = 2 * shape.planes * raw_tokens * shape.head_dim * self._dtype.itemsize
        raw = self._section(0, raw_bytes)
        all_signs = signs(params.seed, params.first_layer, shape.layers, params.first_head, shape.heads, shape.head_dim)
        coded = [self._read_half(half, classes, means[half], bases[half]) for half in _HALVES]
        kv = torch.empty((shape.layers, 2, shape.heads, shape.tokens, shape.head_dim), dtype=self._dtype)
        stop = shape.tokens - params.raw_tail
        if raw_tokens:
            rows = torch.from_numpy(raw.copy()).view(self._dtype)
            rows = rows.view(shape.layers, 2, shape.heads, raw_tokens, shape.head_dim)
            kv[:, :, :, : params.raw_head] = rows[:, :, :, : params.raw_head]
            kv[:, :, :, stop:] = rows[:, :, :, params.raw_head :]
        for half in _HALVES:
            planes = torch.empty((shape.planes, shape.coded, shape.head_dim), dtype=self._dtype)
            for cls, chosen, part in coded[half]:
                rule = params.rules[half][cls]
                decoded = reference.decode_planes(part, rule, all_signs[chosen], shape.coded, self._dtype)
                if decoded is None:
                    raise FrameRefused(NackReason.CODEC, "a digit that is not a level")
                planes[chosen] = decoded
            kv[:, half, :, params.raw_head : stop] = planes.view(shape.layers, shape.heads, shape.coded, shape.head_dim)
        return kv

    def _read_half(
        self, half: int, classes: U8, means: tuple[np.ndarray, np.ndarray], bases: np.ndarray
    ) -> list[tuple[int, np.ndarray, CodedPlanes]]:
        shape, rule = self._shape, self._params.rules[half][PLAIN]
        num_scales = rule.num_scales(shape.coded, shape.head_dim)
        num_mins = 0 if rule.is_symmetric else num_scales
        cursor = _Cursor(self._section(2 + half, shape.planes * (num_scales + 2 * num_mins)))
        scales = cursor.take(shape.planes * num_scales).reshape(shape.planes, num_scales)
        mins = cursor.take(2 * shape.planes * num_mins).view(np.uint16).reshape(shape.planes, num_mins)
        if int(bases.max(initial=0)) + 255 >= 0xFF0 or _has_not_finite(mins):
            raise FrameRefused(NackReason.CODEC, "a scale that is not finite")
        found = []
        for cls in range(NUM_CLASSES):
            chosen = np.flatnonzero(classes == cls)
            num_symbols = self._params.rules[half][cls].num_symbols(shape.coded, shape.head_dim)
            symbols = self._section(4 + half * NUM_CLASSES + cls, chosen.size * num_symbols)
            if chosen.size:
                part = CodedPlanes(
                    means[0][chosen],
                    means[1][chosen],
                    bases[chosen],
                    scales[chosen],
                    mins[chosen],
                    symbols.reshape(chosen.size, num_symbols),
                )
                found.append((cls, chosen, part))
        return found

    def _take_means(self, meta: "_Cursor", rule: PlaneRule) -> tuple[np.ndarray, np.ndarray]:
        shape = self._shape
        if not rule.is_centred:
            return np.zeros(shape.planes, np.uint16), np.zeros((shape.planes, shape.head_dim), np.int8)
        steps = meta.take(2 * shape.planes).view(np.uint16)
        if _has_not_finite(steps):
            raise FrameRefused(NackReason.CODEC, "a mean that is not finite")
        codes = meta.take(shape.planes * shape.head_dim).view(np.int8)
        return steps, codes.reshape(shape.planes, shape.head_dim)

    def _meta_bytes(self) -> int:
        planes = self._shape.planes
        num_centred = sum(classes[PLAIN].is_centred for classes in self._params.rules)
        bitmap = -(-planes // 8) if self._params.has_low_heads else 0
        return bitmap + num_centred * planes * (2 + self._shape.head_dim) + 4 * planes

    def _section(self, idx: int, num_bytes: int) -> U8:
        is_squeezed = bool(self._params.section_bits >> idx & 1)
        return expand(self._sections[idx], is_squeezed, num_bytes, f"section {idx}")


class _Cursor:
    """Takes pieces of a section whose length has been checked."""

    def __init__(self, held: U8) -> None:
        self._held = held
        self._at = 0

    def take(self, num_bytes: int) -> U8:
        self._at += num_bytes
        return self._held[self._at - num_bytes : self._at].copy()


def _stored(sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    raw_bytes = dtype.itemsize
    for extent in shape:
        raw_bytes *= extent
    if len(sections) != 1 or sections[0].numel() != raw_bytes:
        raise FrameRefused(NackReason.LENGTH, f"stored is one section of {raw_bytes} bytes")
    return sections[0].view(dtype).view(*shape)


def _has_not_finite(bits: np.ndarray) -> bool:
    return bool(((bits & 0x7F80) == 0x7F80).any())


def _rules(spec: PipelineSpec) -> tuple[tuple[PlaneRule, ...], ...]:
    def rule(quantiser: Quantiser, levels: int | None, *, is_centred: bool, is_rotated: bool) -> PlaneRule:
        return PlaneRule(
            levels=levels or quantiser.levels,
            axis=quantiser.axis,
            group_tokens=quantiser.group_tokens,
            is_symmetric=quantiser.symmetric,
            order=quantiser.order,
            is_centred=is_centred,
            is_rotated=is_rotated,
            clip=quantiser.clip,
            step_rms=quantiser.step_rms,
        )

    return tuple(
        tuple(rule(quantiser, levels, is_centred=is_centred, is_rotated=is_rotated) for levels in classes)
        for quantiser, classes, is_centred, is_rotated in (
            (spec.k, (None, spec.k_protected_levels, spec.k_low_levels), spec.center_k, spec.rotate_k),
            (spec.v, (None, spec.v_protected_levels, spec.v_low_levels), spec.center_v, spec.rotate_v),
        )
    )


def _classes(params: FrameParams, shape: _Shape, low: U8) -> U8:
    """Return the class of every (layer, head)."""
    classes = np.where(low, LOW, PLAIN).astype(np.uint8).reshape(shape.layers, shape.heads)
    classes[: params.protected_head] = PROTECTED
    classes[shape.layers - params.protected_tail :] = PROTECTED
    return classes.reshape(-1)
