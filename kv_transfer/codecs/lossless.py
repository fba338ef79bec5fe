"""Codec 1: byte planes and zstd. What is most alike in a float (the exponent) gets a plane of its own.

Parameters: codec version u8, mode u8 (0: stored, 1: planes), section bits u8. Section i is byte plane i of the elements
in order, least significant first, of the bits rotated left by one: the sign goes to the least significant bit, and of
bfloat16 and float32 the last plane is the exponent.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codec import RAW, Encoded, FramePlace
from kv_transfer.codecs.entropy import expand, squeeze
from kv_transfer.codecs.planes import U8
from kv_transfer.codecs.spec import CODEC_VERSION
from kv_transfer.frame import FrameRefused, section_spans
from kv_transfer.session import NackReason

_STORED = bytes((CODEC_VERSION, 0))
_WORDS = {2: np.uint16, 4: np.uint32}


class LosslessEncoder:
    """Of one zstd level."""

    codec_id = 1
    is_identity = False
    is_lossless = True

    def __init__(self, zstd_level: int) -> None:
        self._level = zstd_level

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        raw = kv.reshape(-1).view(torch.uint8)
        width = kv.element_size()
        bits, sections = 0, []
        for idx, plane in enumerate(_split(raw.numpy(), width)):
            squeezed = squeeze(plane, self._level)
            if squeezed is not None:
                bits |= 1 << idx
                plane = np.frombuffer(squeezed, dtype=np.uint8)
            sections.append(plane)
        lengths = tuple(section.size for section in sections)
        spans = section_spans(lengths)
        if spans[-1].stop >= raw.numel():
            return Encoded(_STORED, RAW.encode(kv, payload, place).section_bytes)
        target = payload.numpy()
        for span, section in zip(spans, sections, strict=True):
            target[span.start : span.stop] = section
        return Encoded(bytes((CODEC_VERSION, 1, bits)), lengths)


class LosslessDecoder:
    """Of every level."""

    codec_id = 1
    name = "lossless"

    def is_exact(self, params: bytes) -> bool:
        return params == _STORED or (len(params) == 3 and params[:2] == bytes((CODEC_VERSION, 1)))

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_values = 1
        for extent in shape:
            num_values *= extent
        width = dtype.itemsize
        if params == _STORED:
            return RAW.decode(b"", sections, shape, dtype)
        if not self.is_exact(params) or params[2] >> width or len(sections) != width:
            raise FrameRefused(NackReason.CODEC, "parameters are not of the lossless codec")
        planes = [
            expand(section, bool(params[2] >> idx & 1), num_values, f"byte plane {idx}")
            for idx, section in enumerate(sections)
        ]
        return torch.from_numpy(_join(planes, num_values)).view(dtype).view(*shape)


def _split(raw: U8, width: int) -> Sequence[U8]:
    if width == 2 and find_spec("numba") is not None:
        from kv_transfer.codecs.byte_kernels import split_words

        low, high = np.empty(raw.size // 2, dtype=np.uint8), np.empty(raw.size // 2, dtype=np.uint8)
        split_words(raw.view(np.uint16), low, high)
        return low, high
    words = raw.view(_WORDS[width])
    turned = (words << 1 | words >> 8 * width - 1).view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(turned[:, idx]) for idx in range(width)]


def _join(planes: Sequence[U8], num_values: int) -> U8:
    width = len(planes)
    if width == 2 and find_spec("numba") is not None:
        from kv_transfer.codecs.byte_kernels import join_words

        words = np.empty(num_values, dtype=np.uint16)
        low, high = planes
        join_words(low, high, words)
        return words.view(np.uint8)
    turned = np.empty((num_values, width), dtype=np.uint8)
    for idx, plane in enumerate(planes):
        turned[:, idx] = plane
    wide = turned.reshape(-1).view(_WORDS[width])
    return (wide >> 1 | wide << 8 * width - 1).view(np.uint8)
