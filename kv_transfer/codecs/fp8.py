"""Codec 3: 8-bit floats (e4m3) under one float32 scale per token and head.

Parameters: codec version u8, mode u8 (0: stored, 1: coded). Sections: scales float32 ``[layers, 2, heads, tokens]``,
codes ``[layers, 2, heads, tokens, D]``. ``scale = max |x| / 448``, ``code = e4m3(x * (1 / scale))`` rounded to nearest
even, ``x = code * scale``; a scale below the smallest normal has codes 0.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codec import RAW, Encoded, FramePlace
from kv_transfer.codecs.reference import narrowed
from kv_transfer.codecs.spec import CODEC_VERSION
from kv_transfer.frame import FrameRefused, section_spans
from kv_transfer.session import NackReason

_STORED = bytes((CODEC_VERSION, 0))
_CODED = bytes((CODEC_VERSION, 1))
_LARGEST = 448.0
_LARGEST_SCALE = 7.5e35  # times the largest code it is still finite
_TINY = 2.0**-126
_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Fp8Encoder:
    """Without options."""

    codec_id = 3
    is_identity = False
    is_lossless = False

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        rows = kv.numel() // kv.shape[-1]
        lengths = (4 * rows, kv.numel())
        spans = section_spans(lengths)
        if spans[-1].stop < kv.numel() * kv.element_size():
            scales, codes = (payload[span.start : span.stop] for span in spans)
            if _encode(kv, scales, codes):
                return Encoded(_CODED, lengths)
        return Encoded(_STORED, RAW.encode(kv, payload, place).section_bytes)


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
            return RAW.decode(b"", sections, shape, dtype)
        if params != _CODED:
            raise FrameRefused(NackReason.CODEC, "parameters are not of the fp8 codec")
        if len(sections) != 2 or sections[0].numel() != 4 * rows or sections[1].numel() != rows * head_dim:
            raise FrameRefused(NackReason.LENGTH, f"fp8 is {rows} scales and {rows} times {head_dim} codes")
        scale = sections[0].view(torch.float32)
        if not bool((scale.abs() <= _LARGEST_SCALE).all()) or bool((sections[1] & 0x7F == 0x7F).any()):
            raise FrameRefused(NackReason.CODEC, "a scale or a code that is not finite")
        return _decode(sections[1], scale, head_dim, dtype).view(*shape)


def _encode(kv: Tensor, scales: Tensor, codes: Tensor) -> bool:
    """Fill in bytes of scales and codes; False when a value is not finite."""
    if kv.dtype == torch.bfloat16 and kv.device == scales.device and find_spec("numba") is not None:
        from kv_transfer.codecs.byte_kernels import encode_e4m3

        bits = kv.reshape(-1).view(torch.uint8).numpy().view(np.uint16)
        return bool(encode_e4m3(bits, kv.shape[-1], scales.numpy().view(np.float32), codes.numpy()))
    x = kv.float()
    scale = x.abs().amax(-1, keepdim=True) / _LARGEST
    if not bool((scale <= _LARGEST_SCALE).all()):
        return False
    inverse = torch.where(scale < _TINY, torch.zeros_like(scale), 1.0 / scale)
    found = (x * inverse).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    scales.copy_(scale.reshape(-1).view(torch.uint8))
    codes.copy_(found.reshape(-1).view(torch.uint8))
    return True


def _decode(codes: Tensor, scales: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16 and find_spec("numba") is not None:
        from kv_transfer.codecs.byte_kernels import decode_e4m3

        bits = np.empty(codes.numel(), dtype=np.uint16)
        decode_e4m3(codes.numpy(), _TABLE.numpy(), head_dim, scales.numpy(), bits)
        return torch.from_numpy(bits.view(np.uint8)).view(torch.bfloat16)
    rows = codes.view(torch.float8_e4m3fn).view(-1, head_dim).float()
    return narrowed(rows * scales[:, None], dtype)
