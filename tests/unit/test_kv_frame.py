"""Frames: what is sealed is read back; what is changed, cut or invented is refused with a reason, and only refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import TransferId
from core.layout import DTYPE_BYTES
from kv_transfer.box import Box
from kv_transfer.frame import (
    HEADER_BYTES,
    MAX_PARAMS_BYTES,
    MAX_SECTIONS,
    MAX_TRANSFER_ID_BYTES,
    FrameHeader,
    FrameRefused,
    decode,
    decode_header,
    seal,
    section_spans,
)
from kv_transfer.session import NackReason

U32, U64 = 2**32 - 1, 2**64 - 1


def _header(**changes: object) -> FrameHeader:
    values: dict[str, object] = {
        "transfer_id": TransferId("req-1/0"),
        "sender_epoch": 3,
        "receiver_epoch": 7,
        "link_epoch": 1,
        "frame_idx": 0,
        "box": Box(range(2), range(2), range(4, 7)),
        "head_dim": 8,
        "dtype": "float32",
        "codec_id": 0,
        "codec_params": b"",
        "section_bytes": (768,),
        "raw_bytes": 768,
    }
    return FrameHeader(**{**values, **changes})  # type: ignore[arg-type]


def _message(header: FrameHeader, spare: int = 64) -> bytearray:
    message = bytearray(HEADER_BYTES + header.payload_bytes + spare)
    for index in range(HEADER_BYTES, len(message)):
        message[index] = index % 251
    seal(header, memoryview(message))
    return message


def _refusal(message: bytes | bytearray) -> FrameRefused:
    with pytest.raises(FrameRefused) as refused:
        decode(memoryview(message))
    return refused.value


_ranges = st.tuples(st.integers(0, 500), st.integers(1, 200)).map(lambda pair: range(pair[0], pair[0] + pair[1]))


@given(
    transfer_id=st.text(max_size=MAX_TRANSFER_ID_BYTES // 4),
    epochs=st.tuples(*[st.integers(0, U64)] * 3),
    frame_idx=st.integers(0, U32),
    layers=_ranges,
    heads=_ranges,
    tokens=_ranges,
    head_dim=st.integers(1, 1000),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    codec_id=st.integers(0, 255),
    params=st.binary(max_size=MAX_PARAMS_BYTES),
    sections=st.lists(st.integers(0, 300), max_size=MAX_SECTIONS),
)
def test_a_sealed_header_is_read_back(
    transfer_id: str,
    epochs: tuple[int, int, int],
    frame_idx: int,
    layers: range,
    heads: range,
    tokens: range,
    head_dim: int,
    dtype: str,
    codec_id: int,
    params: bytes,
    sections: list[int],
) -> None:
    box = Box(layers, heads, tokens)
    header = FrameHeader(
        transfer_id=TransferId(transfer_id),
        sender_epoch=epochs[0],
        receiver_epoch=epochs[1],
        link_epoch=epochs[2],
        frame_idx=frame_idx,
        box=box,
        head_dim=head_dim,
        dtype=dtype,
        codec_id=codec_id,
        codec_params=params,
        section_bytes=tuple(sections),
        raw_bytes=2 * box.volume * head_dim * DTYPE_BYTES[dtype],
    )
    assert decode(memoryview(_message(header))) == header


def test_sections_start_aligned_and_do_not_overlap() -> None:
    spans = section_spans((1, 64, 0, 65))
    assert [span.start for span in spans] == [0, 64, 128, 128]
    assert [len(span) for span in spans] == [1, 64, 0, 65]


def test_every_changed_byte_is_refused() -> None:
    header = _header()
    good = bytes(_message(header, spare=0))
    used = len(good) - header.payload_bytes - (HEADER_BYTES - 90)  # prefix, section length and id are within this
    for index in [*range(used), *range(HEADER_BYTES, len(good), 97)]:
        bad = bytearray(good)
        bad[index] ^= 0x10
        _refusal(bad)


def test_a_changed_payload_is_a_checksum_error_that_names_its_transfer() -> None:
    message = _message(_header())
    message[HEADER_BYTES + 100] ^= 1
    refused = _refusal(message)
    assert (refused.reason, refused.transfer_id) == (NackReason.CHECKSUM, "req-1/0")


@pytest.mark.parametrize("length", [0, 1, 40, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 767])
def test_a_truncated_message_is_refused(length: int) -> None:
    refused = _refusal(_message(_header())[:length])
    assert refused.reason in (NackReason.MALFORMED, NackReason.LENGTH)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"section_bytes": (U64,)}, NackReason.LENGTH),
        ({"section_bytes": (768, U64 - 768)}, NackReason.LENGTH),
        ({"section_bytes": (10_000,)}, NackReason.LENGTH),
        ({"raw_bytes": U64}, NackReason.LENGTH),
        ({"raw_bytes": 0}, NackReason.LENGTH),
        ({"box": Box(range(65535), range(65535), range(U32))}, NackReason.LENGTH),
        ({"box": Box(range(2, 2), range(2), range(3))}, NackReason.SHAPE),
        ({"box": Box(range(2), range(2), range(7, 4))}, NackReason.SHAPE),
        ({"head_dim": 0}, NackReason.SHAPE),
    ],
    ids=["endless", "wraps around", "longer than the slot", "bomb", "raw 0", "huge box", "no layers", "back", "no dim"],
)
def test_a_header_that_lies_is_refused_although_its_checksum_is_right(
    changes: dict[str, object], reason: NackReason
) -> None:
    lying = _header(**changes)
    message = bytearray(4096)
    real = _header()
    seal(real, memoryview(message))
    try:
        seal(lying, memoryview(message))
    except ValueError:
        pytest.fail("the test cannot build this lie")
    refused = _refusal(message)
    assert (refused.reason, refused.transfer_id) == (reason, "req-1/0")


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"NOPE", NackReason.MALFORMED),
        (4, struct.pack("<H", 99), NackReason.VERSION),
        (6, struct.pack("<H", 65535), NackReason.MALFORMED),
    ],
    ids=["magic", "version", "used bytes"],
)
def test_a_message_that_is_no_frame_names_no_transfer(offset: int, value: bytes, reason: NackReason) -> None:
    message = _message(_header())
    message[offset : offset + len(value)] = value
    refused = _refusal(message)
    assert (refused.reason, refused.transfer_id) == (reason, None)


@given(noise=st.binary(min_size=0, max_size=3000), keep=st.integers(0, 120))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes, keep: int) -> None:
    message = bytes(_message(_header())[:keep]) + noise
    with pytest.raises(FrameRefused):
        decode(memoryview(message))
    with pytest.raises(FrameRefused):
        decode_header(memoryview(message), 0)


def test_what_does_not_fit_into_a_header_cannot_be_sealed() -> None:
    message = memoryview(bytearray(4096))
    with pytest.raises(ValueError, match="too long"):
        seal(_header(transfer_id=TransferId("x" * (MAX_TRANSFER_ID_BYTES + 1))), message)
    with pytest.raises(ValueError, match="too long"):
        seal(_header(codec_params=b"x" * (MAX_PARAMS_BYTES + 1)), message)
