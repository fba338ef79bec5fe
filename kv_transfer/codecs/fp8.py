"""Codec 3: 8-bit floats (e4m3) under one float32 scale per token and head.

Parameters: codec version u8, mode u8 (0: stored, 1: coded). Sections: scales float32 ``[layers, 2, heads, tokens]``,
codes ``[layers, 2, heads, tokens, D]``. ``scale = max |x| / 448``, ``code = e4m3(x * (1 / scale))`` rounded to nearest
even, ``x = code * scale``; a scale below the smallest normal has codes 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kv_transfer.codec import Encoded, FramePlace
from kv_transfer.codecs.spec import CODEC_VERSION
from kv_transfer.frame import FrameRefused, section_spans
from kv_transfer.session import NackReason

_STORED = bytes((CODEC_VERSION, 0))
_CODED = bytes((CODEC_VERSION, 1))
_LARGEST = 448.0
_TINY = 2.0**-126


class Fp8Encoder:
    """Without options."""

    codec_id = 3
    is_identity = False
    is_lossless = False

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        raw = kv.reshape(-1).view(torch.uint8)
        x = kv.float()
        scale = x.abs().amax(-1, keepdim=True) / _LARGEST
        lengths = (4 * scale.numel(), x.numel())
        spans = section_spans(lengths)
        if spans[-1].stop >= raw.numel() or not bool(torch.isfinite(scale).all()):
            payload[: raw.numel()].copy_(raw)
            return Encoded(_STORED, (raw.numel(),))
        inverse = torch.where(scale < _TINY, torch.zeros_like(scale), 1.0 / scale)
        codes = (x * inverse).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        payload[spans[0].start : spans[0].stop].copy_(scale.reshape(-1).view(torch.uint8))
        payload[spans[1].start : spans[1].stop].copy_(codes.reshape(-1).view(torch.uint8))
        return Encoded(_CODED, lengths)


class Fp8Decoder:
    """Without options."""

    codec_id = 3
    name = "fp8"

    def is_exact(self, params: bytes) -> bool:
        return params == _STORED

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        rows = 1
        for extent in shape[:-1]:
            rows *= extent
        head_dim = shape[-1]
        if params == _STORED:
            if len(sections) != 1 or sections[0].numel() != rows * head_dim * dtype.itemsize:
                raise FrameRefused(NackReason.LENGTH, f"stored is one section of {rows * head_dim} values")
            return sections[0].view(dtype).view(*shape)
        if params != _CODED:
            raise FrameRefused(NackReason.CODEC, "parameters are not of the fp8 codec")
        if len(sections) != 2 or sections[0].numel() != 4 * rows or sections[1].numel() != rows * head_dim:
            raise FrameRefused(NackReason.LENGTH, f"fp8 is {rows} scales and {rows} times {head_dim} codes")
        scale = sections[0].view(torch.float32)
        codes = sections[1].view(torch.float8_e4m3fn).view(rows, head_dim).float()
        if not bool(torch.isfinite(scale).all()) or not bool(torch.isfinite(codes).all()):
            raise FrameRefused(NackReason.CODEC, "a scale or a code that is not finite")
        return (codes * scale[:, None]).to(dtype).view(*shape)
