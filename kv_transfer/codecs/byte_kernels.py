"""Compiled loops of the lossless and the fp8 codec; see `encode_kernel` for how such code is written.

They equal the few lines of torch and numpy beside which they are used, bit for bit.
"""

from typing import Any

import numpy as np

from core.compiled import compiled
from kv_transfer.codecs.encode_kernel import MAGIC

_F0 = np.float32(0)
_F1 = np.float32(1)
_TINY = np.float32(2.0**-126)
_LARGEST = np.float32(448)
_LARGEST_SCALE = np.float32(7.5e35)  # as in `fp8`
_ABS = np.int32(0x7FFFFFFF)
_NORMAL = np.int32(0x3C800000)  # 2 ** -6, the smallest normal of e4m3
_NOT_FINITE = np.int32(0x7F800000)


@compiled
def split_words(words: Any, low: Any, high: Any) -> None:
    """Byte planes of 16-bit words, rotated left by one."""
    for i in range(words.shape[0]):
        word = words[i]
        low[i] = np.uint8((word << np.uint16(1)) | (word >> np.uint16(15)))
    for i in range(words.shape[0]):
        high[i] = np.uint8(words[i] >> np.uint16(7))


@compiled
def join_words(low: Any, high: Any, words: Any) -> None:
    """Undo `split_words`."""
    for i in range(words.shape[0]):
        a, b = np.uint32(low[i]), np.uint32(high[i])
        words[i] = np.uint16((b << np.uint32(7)) | (a >> np.uint32(1)) | (a << np.uint32(15)))


@compiled
def encode_e4m3(bits: Any, width: int, scales: Any, codes: Any) -> bool:
    """Code bfloat16 rows under a scale each; False when a value is not finite."""
    row = np.empty(width, np.float32)
    row_bits = row.view(np.int32)
    turned = np.empty(width, np.float32)
    turned_bits = turned.view(np.int32)
    magic_bits = np.int32(0x4B400000)
    for t in range(scales.shape[0]):
        source, out = bits[t * width : (t + 1) * width], codes[t * width : (t + 1) * width]
        most = np.int32(0)
        for d in range(width):
            word = np.int32(source[d]) << np.int32(16)
            row_bits[d] = word
            most = max(most, np.int32(word & _ABS))
        turned_bits[0] = most
        scale = turned[0] / _LARGEST
        if most >= _NOT_FINITE or scale > _LARGEST_SCALE:
            return False
        scales[t] = scale
        inverse = _F0 if scale < _TINY else _F1 / scale
        for d in range(width):
            row[d] = min(max(row[d] * inverse, -_LARGEST), _LARGEST)
            turned[d] = abs(row[d]) * np.float32(512) + MAGIC
        for d in range(width):
            size = np.int32(row_bits[d] & _ABS)
            sign = np.int32((row_bits[d] >> np.int32(24)) & np.int32(0x80))
            normal = ((size + np.int32(0x7FFFF) + ((size >> np.int32(20)) & np.int32(1))) >> np.int32(20)) - np.int32(
                960
            )
            out[d] = np.uint8((normal if size >= _NORMAL else turned_bits[d] - magic_bits) | sign)
    return True


@compiled
def decode_e4m3(codes: Any, table: Any, width: int, scales: Any, bits: Any) -> None:
    """Write bfloat16 rows; `table` has the value of each code."""
    row = np.empty(width, np.float32)
    word = row.view(np.int32)
    for t in range(scales.shape[0]):
        source, out = codes[t * width : (t + 1) * width], bits[t * width : (t + 1) * width]
        scale = scales[t]
        for d in range(width):
            row[d] = table[source[d]] * scale
        for d in range(width):
            w = word[d]
            out[d] = np.uint16((w + np.int32(0x7FFF) + ((w >> np.int32(16)) & np.int32(1))) >> np.int32(16))
