"""Codecs: how the KV of a box becomes the sections of a frame, and back.

A profile (a named, measured pipeline) is a codec with parameters; adding one is adding a file with a class that
implements `Codec`, and one line where the table of codecs is composed. A decoder gets everything from the frame: the
parameters blob, the sections, the shape. It runs on bytes from another process: it must refuse, not crash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.layout import DTYPE_BYTES
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
assert TORCH_DTYPES.keys() == DTYPE_BYTES.keys()


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder left in the payload: parameters for the header, and the length of each section."""

    params: bytes
    section_bytes: tuple[int, ...]


class Codec(Protocol):
    """One way to code KV. Stateless; called from several threads at once.

    Attributes:
        codec_id: on the wire, 0 to 255, never reused.
        name: for people and metrics.
        is_identity: the payload is the canonical tensor itself, so it may be gathered right into the payload.
    """

    codec_id: int
    name: str
    is_identity: bool

    def max_payload_bytes(self, raw_bytes: int) -> int:
        """Return a bound on the payload of a tensor of `raw_bytes`; non-decreasing. Pure."""
        ...

    def encode(self, kv: Tensor, payload: Tensor) -> Encoded:
        """Write the sections of `kv` where `frame.section_spans` will look for them.

        Args:
            kv: canonical ``[layers, 2, K, T, D]``, contiguous.
            payload: uint8, at least `max_payload_bytes` long, 64-byte aligned. May be the memory of `kv` itself when
                `is_identity`.
        """
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
    """The tensor's own bytes in one section."""

    codec_id = 0
    name = "raw"
    is_identity = True

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def encode(self, kv: Tensor, payload: Tensor) -> Encoded:
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


def default_codecs() -> Mapping[int, Codec]:
    """Return the codecs of this build by id. Pure."""
    codecs: tuple[Codec, ...] = (RAW,)
    return {codec.codec_id: codec for codec in codecs}
