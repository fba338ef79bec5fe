"""The frame: one self-describing message on a link. Whoever has the bytes needs no profile and no state to decode it.

A message is a header area of `HEADER_BYTES` and then the payload. The area holds (little endian, no gaps)::

    prefix        fixed, `_PREFIX`: magic, version, used bytes, checksum, epochs, index, ranges, dtype, codec, counts
    sections      num_sections x u64: length of each section
    transfer id   UTF-8
    codec params  opaque to the frame; the codec checks them

and zeros. The payload is the sections in order, each starting at a multiple of `SECTION_ALIGN` so that a codec may view
it as any dtype. The checksum is XXH3-64 over the used header bytes (checksum field zero), then over the payload with
its padding. One area of fixed size, not a header as short as it can be: the payload then starts aligned, and a link
that must know sizes before it receives (NCCL) sends the area as its fixed-size first message.

`decode` believes nothing: every length is checked against what has really arrived before it is used, and nothing is
allocated from a number in the header. What they mean for a transfer is the receiver's to check (`receiver.landing`).
"""

import struct
from dataclasses import dataclass

import xxhash

from core.errors import ProtocolError
from core.ids import TransferId
from core.layout import DTYPE_BYTES
from kv_transfer.box import Box
from kv_transfer.session import NackReason

FRAME_VERSION = 1
HEADER_BYTES = 1024
SECTION_ALIGN = 64
MAX_SECTIONS = 16
MAX_TRANSFER_ID_BYTES = 200
MAX_PARAMS_BYTES = 512

_MAGIC = b"TDKV"
# magic, version, used bytes, checksum | sender, receiver, link epoch | frame index | layers | heads | tokens
# | head_dim, dtype, codec, sections, id bytes, params bytes | raw bytes
_PREFIX = struct.Struct("<4sHHQ QQQ I HH HH II HBBBBH Q")
_CHECKSUM_AT = 8
_CHECKSUM = struct.Struct("<Q")
_DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}

assert _PREFIX.size + 8 * MAX_SECTIONS + MAX_TRANSFER_ID_BYTES + MAX_PARAMS_BYTES <= HEADER_BYTES


class FrameRefused(ProtocolError):
    """A frame that must not be written. `transfer_id` is what it claims to belong to, None when it is not readable."""

    def __init__(self, reason: NackReason, detail: str, transfer_id: TransferId | None = None) -> None:
        super().__init__(f"frame refused: {reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.transfer_id = transfer_id


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says about itself.

    Attributes:
        sender_epoch, receiver_epoch, link_epoch: incarnations and link that it was written for.
        frame_idx: from 0 within the transfer; for people and traces, order is not needed.
        head_dim, dtype: of the decoded tensor ``[layers, 2, heads, tokens, head_dim]``.
        section_bytes: length of each section, without padding.
        raw_bytes: size of the decoded tensor.
    """

    transfer_id: TransferId
    sender_epoch: int
    receiver_epoch: int
    link_epoch: int
    frame_idx: int
    box: Box
    head_dim: int
    dtype: str
    codec_id: int
    codec_params: bytes
    section_bytes: tuple[int, ...]
    raw_bytes: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (len(self.box.layers), 2, len(self.box.heads), len(self.box.tokens), self.head_dim)

    @property
    def payload_bytes(self) -> int:
        """Sections with the padding between them."""
        return section_spans(self.section_bytes)[-1].stop if self.section_bytes else 0


def section_spans(section_bytes: tuple[int, ...]) -> list[range]:
    """Return where each section lies in the payload. Pure."""
    spans: list[range] = []
    at = 0
    for length in section_bytes:
        spans.append(range(at, at + length))
        at = -(-(at + length) // SECTION_ALIGN) * SECTION_ALIGN
    return spans


def seal(header: FrameHeader, message: memoryview) -> int:
    """Write the header, with the checksum over the payload that is already there, in front of it.

    Args:
        message: writable bytes: header area, then at least `header.payload_bytes`.

    Returns:
        Length of the message to send.
    """
    transfer_id = header.transfer_id.encode()
    if len(transfer_id) > MAX_TRANSFER_ID_BYTES or len(header.codec_params) > MAX_PARAMS_BYTES:
        raise ValueError("transfer id or codec parameters are too long for a frame header")
    lengths = struct.pack(f"<{len(header.section_bytes)}Q", *header.section_bytes)
    variable = lengths + transfer_id + header.codec_params
    box = header.box
    prefix = _PREFIX.pack(
        _MAGIC,
        FRAME_VERSION,
        _PREFIX.size + len(variable),
        0,
        header.sender_epoch,
        header.receiver_epoch,
        header.link_epoch,
        header.frame_idx,
        box.layers.start,
        box.layers.stop,
        box.heads.start,
        box.heads.stop,
        box.tokens.start,
        box.tokens.stop,
        header.head_dim,
        _DTYPE_CODES[header.dtype],
        header.codec_id,
        len(header.section_bytes),
        len(transfer_id),
        len(header.codec_params),
        header.raw_bytes,
    )
    used = prefix + variable
    end = HEADER_BYTES + header.payload_bytes
    message[:HEADER_BYTES] = used.ljust(HEADER_BYTES, b"\0")
    checksum = _checksum(used, message[HEADER_BYTES:end])
    message[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM.size] = _CHECKSUM.pack(checksum)
    return end


def decode(message: memoryview) -> FrameHeader:
    """Read and verify a frame. Pure.

    Args:
        message: what arrived, or the whole receive slot (longer than the frame, never trusted to be). It may be memory
            that the sender can still write to: the header area is copied once, and nothing is read from it again.

    Raises:
        FrameRefused: with the first problem found.
    """
    area = memoryview(bytes(message[:HEADER_BYTES]))
    header = decode_header(area, len(message) - HEADER_BYTES)
    used = bytearray(area[: _used_bytes(area)])
    (stated,) = _CHECKSUM.unpack_from(used, _CHECKSUM_AT)
    used[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM.size] = bytes(_CHECKSUM.size)
    found = _checksum(used, message[HEADER_BYTES : HEADER_BYTES + header.payload_bytes])
    if found != stated:
        raise FrameRefused(
            NackReason.CHECKSUM,
            f"stated {stated:016x}, found {found:016x} (frame {header.frame_idx})",
            header.transfer_id,
        )
    return header


def decode_header(area: memoryview, max_payload_bytes: int) -> FrameHeader:
    """Read a header area without its payload (the checksum is not verified). Pure.

    Raises:
        FrameRefused: MALFORMED, VERSION, LENGTH or SHAPE.
    """
    if len(area) < HEADER_BYTES:
        raise FrameRefused(NackReason.MALFORMED, f"{len(area)} bytes are less than a header")
    fields = _PREFIX.unpack_from(area)
    magic, version, used_bytes = fields[:3]
    if magic != _MAGIC:
        raise FrameRefused(NackReason.MALFORMED, "no frame starts here")
    if version != FRAME_VERSION:
        raise FrameRefused(NackReason.VERSION, f"frame version {version}, this side speaks {FRAME_VERSION}")
    sender_epoch, receiver_epoch, link_epoch, frame_idx = fields[4:8]
    layers, heads, tokens = (range(fields[at], fields[at + 1]) for at in (8, 10, 12))
    head_dim, dtype_code, codec_id, num_sections, id_bytes, params_bytes, raw_bytes = fields[14:]
    if (
        num_sections > MAX_SECTIONS
        or id_bytes > MAX_TRANSFER_ID_BYTES
        or params_bytes > MAX_PARAMS_BYTES
        or used_bytes != _PREFIX.size + 8 * num_sections + id_bytes + params_bytes
    ):
        raise FrameRefused(NackReason.MALFORMED, "the header's own lengths do not add up")
    at = _PREFIX.size + 8 * num_sections
    try:
        transfer_id = TransferId(bytes(area[at : at + id_bytes]).decode())
    except UnicodeDecodeError as error:
        raise FrameRefused(NackReason.MALFORMED, "the transfer id is not UTF-8") from error
    if not (len(layers) and len(heads) and len(tokens) and head_dim) or dtype_code not in _DTYPE_NAMES:
        raise FrameRefused(NackReason.SHAPE, "an empty range or an unknown dtype", transfer_id)
    header = FrameHeader(
        transfer_id=transfer_id,
        sender_epoch=sender_epoch,
        receiver_epoch=receiver_epoch,
        link_epoch=link_epoch,
        frame_idx=frame_idx,
        box=Box(layers, heads, tokens),
        head_dim=head_dim,
        dtype=_DTYPE_NAMES[dtype_code],
        codec_id=codec_id,
        codec_params=bytes(area[at + id_bytes : at + id_bytes + params_bytes]),
        section_bytes=struct.unpack_from(f"<{num_sections}Q", area, _PREFIX.size),
        raw_bytes=raw_bytes,
    )
    if header.payload_bytes > max_payload_bytes:
        raise FrameRefused(
            NackReason.LENGTH, f"{header.payload_bytes} bytes of sections in {max_payload_bytes}", transfer_id
        )
    if raw_bytes != 2 * header.box.volume * head_dim * DTYPE_BYTES[header.dtype]:
        raise FrameRefused(NackReason.LENGTH, f"{raw_bytes} raw bytes are not those of its shape", transfer_id)
    return header


def _used_bytes(message: memoryview) -> int:
    used_bytes: int = _PREFIX.unpack_from(message)[2]
    return used_bytes


def _checksum(used_header: bytes | bytearray, payload: memoryview) -> int:
    digest = xxhash.xxh3_64(used_header)
    digest.update(payload)
    return digest.intdigest()
