"""The entropy stage: bytes of a known size, through zstd when that is smaller.

A coder object keeps its working memory and must not be shared by threads, so there is one per thread and level.
"""

import threading

import numpy as np
import zstandard
from torch import Tensor

from kv_transfer.codecs.planes import U8
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason

_FRAME_HEADER_MAX = 18
_HASH_LOG = 12  # of level 1; zstd's own is 14
_own = threading.local()


def squeeze(plain: U8, level: int, block_bytes: int | None = None) -> bytes | None:
    """Return the zstd frame of `plain` when it is smaller, else None. Pure.

    Args:
        block_bytes: where the statistics of the bytes change: each block has a code table of its own.
    """
    if plain.size <= _FRAME_HEADER_MAX:
        return None
    coders: dict[int, zstandard.ZstdCompressor] = _own.__dict__.setdefault("coders", {})
    coder = coders.get(level)
    if coder is None:
        coder = coders[level] = zstandard.ZstdCompressor(compression_params=_params(level))
    squeezed = coder.compress(plain.data) if block_bytes is None else _in_blocks(coder, plain, block_bytes)
    return squeezed if len(squeezed) < plain.size else None


def _params(level: int) -> zstandard.ZstdCompressionParameters:
    """Return level 1 with a smaller table: an eighth less time, and as small, since what recurs are rows of tokens."""
    smaller = {"hash_log": _HASH_LOG} if level == 1 else {}
    return zstandard.ZstdCompressionParameters.from_level(level, **smaller)


def _in_blocks(coder: zstandard.ZstdCompressor, plain: U8, block_bytes: int) -> bytes:
    stream = coder.compressobj(size=plain.size)
    parts = []
    for start in range(0, plain.size, block_bytes):
        parts.append(stream.compress(plain[start : start + block_bytes].data))
        parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join((*parts, stream.flush()))


def expand(section: Tensor, is_squeezed: bool, num_bytes: int, what: str) -> U8:
    """Return the `num_bytes` bytes of a section. Pure; may share the section's memory.

    Raises:
        FrameRefused: LENGTH, or CODEC: not one zstd frame of that size. Nothing larger is ever allocated.
    """
    held: U8 = section.numpy()
    if not is_squeezed:
        if held.size != num_bytes:
            raise FrameRefused(NackReason.LENGTH, f"{what}: {held.size} bytes, not {num_bytes}")
        return held
    try:
        stated = zstandard.get_frame_parameters(held.data).content_size
        if stated != num_bytes:
            raise FrameRefused(NackReason.LENGTH, f"{what}: states {stated} bytes, not {num_bytes}")
        coder: zstandard.ZstdDecompressor | None = getattr(_own, "expander", None)
        if coder is None:
            coder = _own.expander = zstandard.ZstdDecompressor()
        plain = coder.decompress(held.data, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameRefused(NackReason.CODEC, f"{what}: {error}") from error
    if len(plain) != num_bytes:
        raise FrameRefused(NackReason.LENGTH, f"{what}: {len(plain)} bytes, not {num_bytes}")
    return np.frombuffer(plain, dtype=np.uint8)
