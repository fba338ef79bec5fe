"""Frames from a stranger: a decoder returns a tensor of the right shape or refuses, whatever it is given."""

import struct
from dataclasses import replace

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_transfer.codecs.frame_params import STORED, unpack
from kv_transfer.codecs.frame_plan import META_SECTION, NUM_SECTIONS, SCALES_SECTION, SYMBOLS_SECTION
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.spec import CODEC_VERSION, PipelineSpec, Quantiser
from kv_transfer.frame import FrameRefused
from kv_transfer.session import NackReason
from tests.kv_codec_frames import DECODERS, CodedFrame, code, quantised_specs, random_kv

RUNGS = {**ladder(10_000.0), "plain": PipelineSpec(entropy="none", k=Quantiser(levels=6), v=Quantiser(levels=6))}
del RUNGS["none"]
FRAMES = {name: code(spec, random_kv(1, 2, 2, 70, 24, torch.bfloat16)) for name, spec in RUNGS.items()}
SHAPES = [
    (2, 2, 2, 70, 24),
    (2, 2, 2, 71, 24),
    (2, 2, 2, 70, 25),
    (1, 2, 4, 70, 24),
    (4, 2, 2, 70, 12),
    (1, 2, 1, 1, 1),
]


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _decode(frame: CodedFrame) -> Tensor | None:
    """Return what a decoder makes of it; None: refused. Anything else is a failure."""
    try:
        decoded = frame.decode()
    except FrameRefused as refused:
        if refused.reason not in (NackReason.CODEC, NackReason.LENGTH):
            raise
        return None
    assert tuple(decoded.shape) == frame.shape
    assert decoded.dtype == frame.dtype
    return decoded


@st.composite
def spoilt(draw: st.DrawFn, frame: CodedFrame) -> CodedFrame:
    """Change a few things anywhere."""
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(("params", "section", "section", "shape", "dtype", "count")))
        if part == "params":
            frame = replace(frame, params=_spoil(draw, frame.params))
        elif part == "section" and frame.sections:
            idx = draw(st.integers(0, len(frame.sections) - 1))
            frame = frame.with_section(idx, _bytes(_spoil(draw, bytes(frame.sections[idx].numpy()))))
        elif part == "shape":
            frame = replace(frame, shape=draw(st.sampled_from(SHAPES)))
        elif part == "dtype":
            frame = replace(frame, dtype=draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))))
        elif part == "count":
            sections = draw(st.permutations(frame.sections))[: draw(st.integers(0, len(frame.sections)))]
            frame = replace(frame, sections=tuple(sections))
    return frame


def _spoil(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(st.sampled_from(("flip", "flip", "cut", "grow", "random")))
    if kind == "flip" and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes((draw(st.integers(0, 255)),)) + data[at + 1 :]
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "grow":
        return data + draw(st.binary(min_size=1, max_size=40))
    return draw(st.binary(max_size=len(data) + 2))


@settings(max_examples=600, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FRAMES)))
def test_a_spoilt_frame_is_decoded_to_its_shape_or_refused(data: st.DataObject, name: str) -> None:
    _decode(data.draw(spoilt(FRAMES[name])))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), spec=quantised_specs())
def test_of_any_pipeline(data: st.DataObject, spec: PipelineSpec) -> None:
    _decode(data.draw(spoilt(code(spec, random_kv(2, 2, 2, 33, 10, torch.bfloat16)))))


@settings(max_examples=300, deadline=None)
@given(
    codec_id=st.integers(1, 3), params=st.binary(max_size=80), sections=st.lists(st.binary(max_size=200), max_size=16)
)
def test_garbage_is_refused_and_never_called_exact(codec_id: int, params: bytes, sections: list[bytes]) -> None:
    decoder = DECODERS[codec_id]
    frame = CodedFrame(codec_id, params, tuple(map(_bytes, sections)), (1, 2, 2, 5, 8), torch.bfloat16)
    decoded = _decode(frame)
    if decoder.is_exact(params) and decoded is not None:
        stored = len(sections) == 1 and len(sections[0]) == 2 * decoded.numel()
        assert codec_id == 1 or stored


@pytest.mark.parametrize("name", sorted(FRAMES))
@pytest.mark.parametrize("change", [-1, 1])
def test_every_section_has_one_right_length(name: str, change: int) -> None:
    frame = FRAMES[name]
    for idx, section in enumerate(frame.sections):
        if section.numel():
            wrong = section[:change] if change < 0 else torch.cat((section, section[:1]))
            assert _decode(frame.with_section(idx, wrong)) is None, idx


@pytest.mark.parametrize("name", ["x4", "x8", "lossless"])
def test_a_zip_bomb_allocates_nothing(name: str) -> None:
    """A section that states, or that hides, more than its shape holds is refused before it is inflated."""
    frame = FRAMES[name]
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(64 << 20))
    for idx in range(len(frame.sections)):
        for evil in (bomb, silent):
            assert _decode(frame.with_section(idx, _bytes(evil))) is None


def test_a_section_that_lies_about_its_size_is_refused() -> None:
    frame = FRAMES["x4"]
    idx = next(i for i in range(SYMBOLS_SECTION, NUM_SECTIONS) if unpack(frame.params).section_bits >> i & 1)
    held = bytes(frame.sections[idx].numpy())
    true_bytes = zstandard.get_frame_parameters(held).content_size
    for actual in (true_bytes - 1, true_bytes + 1, 40 * true_bytes):
        lying = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(actual)))
        stated = zstandard.get_frame_parameters(bytes(lying)).content_size
        assert stated == actual
        flag = lying[4] >> 6
        if flag == 1:
            lying[5:7] = struct.pack("<H", true_bytes - 256)
        elif flag == 2:
            lying[5:9] = struct.pack("<I", true_bytes)
        if zstandard.get_frame_parameters(bytes(lying)).content_size == true_bytes:
            assert _decode(frame.with_section(idx, _bytes(bytes(lying)))) is None
    assert _decode(frame.with_section(idx, _bytes(held + held))) is None


def test_digits_that_are_no_levels_are_refused() -> None:
    frame = FRAMES["plain"]
    symbols = frame.sections[SYMBOLS_SECTION].clone()
    symbols[-1] = 6**3
    assert _decode(frame.with_section(SYMBOLS_SECTION, symbols)) is None
    symbols[-1] = 6**3 - 1
    assert _decode(frame.with_section(SYMBOLS_SECTION, symbols)) is not None


def test_steps_and_means_too_large_to_be_finite_are_refused() -> None:
    frame = FRAMES["plain"]
    meta = frame.sections[META_SECTION]
    huge = meta.clone()
    huge[0:2] = _bytes(struct.pack("<H", 0x7F80))  # K's first mean step: infinity
    assert _decode(frame.with_section(META_SECTION, huge)) is None
    huge = meta.clone()
    huge[-2:] = _bytes(struct.pack("<H", 0xFFFF))  # V's last base
    assert _decode(frame.with_section(META_SECTION, huge)) is None
    largest = frame.sections[SCALES_SECTION].clone().fill_(255)
    decoded = _decode(frame.with_section(SCALES_SECTION, largest))
    assert decoded is not None
    assert decoded.isfinite().all()


def test_scales_of_fp8_must_be_finite() -> None:
    frame = FRAMES["fp8"]
    for idx, evil in ((0, b"\0\0\x80\x7f"), (0, b"\xff\xff\xff\xff"), (1, b"\x7f\xff\x7f\xff")):
        section = frame.sections[idx].clone()
        section[:4] = _bytes(evil)
        assert _decode(frame.with_section(idx, section)) is None


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_another_codec_version_is_refused(name: str) -> None:
    frame = FRAMES[name]
    assert _decode(replace(frame, params=bytes((CODEC_VERSION + 1,)) + frame.params[1:])) is None
    assert frame.params[:1] == STORED[:1]
