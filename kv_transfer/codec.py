"""Codecs: how the KV of a box becomes the sections of a frame, and back.

An `Encoder` is one profile's pipeline with its parameters; a `Decoder` is everything of one codec id, and gets all it
needs from the frame: the parameters blob, the sections, the shape. It runs on bytes from another process: it must
refuse, not crash. Adding a codec is adding a file and one line where the table of decoders is composed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.layout import DTYPE_BYTES
from kv_transfer.box import Box
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}  # torch has these names


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder left in the payload: parameters for the header, and the length of each section."""

    params: bytes
    section_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FramePlace:
    """Where a frame lies in its transfer and its model: what stages that depend on positions go by.

    Attributes:
        box: global ranges of the frame.
        num_tokens: of the whole prompt.
        num_layers, num_heads: of the model.
    """

    box: Box
    num_tokens: int
    num_layers: int
    num_heads: int


class Encoder(Protocol):
    """One way to code KV, with its parameters. Stateless; called from several threads at once, without the GIL's help.

    Attributes:
        codec_id: on the wire, 0 to 255, never reused.
        is_identity: the payload is the canonical tensor itself, so it may be gathered right into the payload.
        is_lossless: what the decoder returns is equal bit for bit.
    """

    codec_id: int
    is_identity: bool
    is_lossless: bool

    def max_payload_bytes(self, raw_bytes: int) -> int:
        """Return a bound on the payload of a tensor of `raw_bytes`; non-decreasing. Pure."""
        ...

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        """Write the sections of `kv` where `frame.section_spans` will look for them.

        Args:
            kv: canonical ``[layers, 2, K, T, D]``, contiguous.
            payload: uint8, at least `max_payload_bytes` long, 64-byte aligned. May be the memory of `kv` itself when
                `is_identity`.
        """
        ...


class Decoder(Protocol):
    """Reads every frame of one codec id. Stateless; called from several threads at once."""

    codec_id: int
    name: str

    def is_exact(self, params: bytes) -> bool:
        """Tell whether what these parameters describe is equal bit for bit. Pure; garbage is not lossless."""
        ...

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the canonical tensor. It may share memory with `sections`, which are lent.

        Args:
            sections: uint8, aligned, of the lengths that the header states.
            shape, dtype: of the result; their size has been checked against the reservation.

        Raises:
            FrameRefused: CODEC or LENGTH: sections or parameters cannot be of this shape. Nothing was allocated from
                a number that the sections state.
        """
        ...


class RawCodec:
    """The tensor's own bytes in one section: encoder and decoder."""

    codec_id = 0
    name = "raw"
    is_identity = True
    is_lossless = True

    def is_exact(self, params: bytes) -> bool:
        return not params

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor, place: FramePlace) -> Encoded:
        num_bytes = kv.numel() * kv.element_size()
        if kv.data_ptr() != payload.data_ptr():
            payload[:num_bytes].copy_(kv.reshape(-1).view(torch.uint8))
        return Encoded(b"", (num_bytes,))

    def decode(self, params: bytes, sections: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if params:
            raise FrameRefused(NackReason.CODEC, "raw takes no parameters")
        raw_bytes = dtype.itemsize
        for extent in shape:
            raw_bytes *= extent
        if len(sections) != 1 or sections[0].numel() != raw_bytes:
            raise FrameRefused(NackReason.LENGTH, f"raw is one section of {raw_bytes} bytes")
        return sections[0].view(dtype).view(*shape)


RAW = RawCodec()


def default_decoders() -> Mapping[int, Decoder]:
    """Return the decoders of this build by codec id. Pure."""
    from kv_transfer.codecs.pipeline import CODED_DECODERS  # they build on the ports of this module

    decoders: tuple[Decoder, ...] = (RAW, *CODED_DECODERS)
    return {decoder.codec_id: decoder for decoder in decoders}
