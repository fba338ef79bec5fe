"""Pipelines as their users see them: what comes back, how far off it may be, and how many bytes it took."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from core.config import parse_config
from kv_transfer.box import Box
from kv_transfer.codec import FramePlace, default_decoders
from kv_transfer.codecs.frame_params import STORED
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.roundtrip import roundtrip
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.frame import HEADER_BYTES
from tests.kv_codec_frames import code, place_of, quantised_specs, random_kv

PLAIN = PipelineSpec(center_k=False, rotate_k=False)
SMALL = Quantiser(levels=4)


def _noise(tokens: int = 256, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((4, 2, 2, tokens, head_dim), generator=generator).to(dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=0, max_size=256),
    head_dim=st.sampled_from((1, 8, 80)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    level=st.sampled_from((1, 3)),
)
def test_lossless_returns_every_bit_of_anything(data: bytes, head_dim: int, dtype: torch.dtype, level: int) -> None:
    count = 2 * 2 * 2 * 9 * head_dim * dtype.itemsize
    raw = torch.frombuffer(bytearray((data * count + bytes(count))[:count]), dtype=torch.uint8)  # NaN patterns too
    kv = raw.view(dtype).view(2, 2, 2, 9, head_dim)
    frame = code(PipelineSpec(kind="lossless", zstd_level=level), kv)
    assert torch.equal(_bits(frame.decode()), _bits(kv))
    assert default_decoders()[frame.codec_id].is_exact(frame.params)


def test_lossless_makes_real_numbers_smaller() -> None:
    kv = _noise()
    assert code(PipelineSpec(kind="lossless"), kv).payload_bytes < 0.75 * kv.numel() * 2


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 15, 16, 64, 255, 256])
@pytest.mark.parametrize("axis", ["token", "group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_value_is_further_off_than_half_a_step(levels: int, axis: str, symmetric: bool) -> None:
    quantiser = Quantiser.model_validate({"levels": levels, "axis": axis, "symmetric": symmetric, "group_tokens": 16})
    kv = random_kv(3, 2, 2, 50, 24, torch.float32)
    decoded = code(PLAIN.model_copy(update={"k": quantiser, "v": quantiser}), kv).decode()
    dims = {"token": (-1,), "group": (-2,), "channel": (-2,), "tensor": (-2, -1)}[axis]
    widest = (
        kv.abs().amax(dims, keepdim=True) * 2
        if symmetric
        else kv.amax(dims, keepdim=True) - kv.amin(dims, keepdim=True)
    )
    # A step is rounded up by less than 1/16, and a least value down by less than 1/128 of itself.
    step = (widest + (0 if symmetric else kv.abs().amax(dims, keepdim=True) / 128)) / (levels - 1) * 17 / 16
    assert ((decoded - kv).abs() <= step / 2 + 1e-5).all()


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128])
def test_more_levels_are_closer(head_dim: int) -> None:
    kv = random_kv(5, 2, 2, 200, head_dim, torch.float32)
    errors = []
    for levels in (2, 4, 8, 16, 64, 256):
        quantiser = Quantiser(levels=levels)
        spec = PipelineSpec(k=quantiser, v=quantiser, rotate_v=True, center_v=True, rope_theta=10_000.0)
        errors.append(float((code(spec, kv).decode() - kv).pow(2).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


def test_centring_rotating_and_unrotating_pay() -> None:
    """Each stage makes K with its usual flaws closer at equal levels."""
    position = torch.arange(300)[:, None] * 10_000 ** (-torch.arange(32) / 32)
    steady = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 4
    k = steady + torch.randn((2, 2, 300, 64), generator=torch.Generator().manual_seed(1))
    k[..., 7] *= 8  # a loud channel
    u, w = k.chunk(2, -1)
    k = torch.cat((u * position.cos() - w * position.sin(), w * position.cos() + u * position.sin()), -1)
    kv = torch.stack((k, torch.zeros_like(k)), 1).contiguous()
    errors = []
    for stages in (
        {"center_k": False, "rotate_k": False},
        {"center_k": False, "rotate_k": True},
        {"center_k": True, "rotate_k": True},
        {"center_k": True, "rotate_k": True, "rope_theta": 10_000.0},
    ):
        spec = PipelineSpec.model_validate({"k": SMALL, "v": SMALL, **stages})
        errors.append(float((code(spec, kv).decode() - kv)[:, 0].pow(2).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


@settings(max_examples=60, deadline=None)
@given(spec=quantised_specs(), tokens=st.integers(1, 60), first_token=st.integers(0, 40), after=st.integers(0, 40))
def test_sinks_and_tail_stay_raw(spec: PipelineSpec, tokens: int, first_token: int, after: int) -> None:
    kv = random_kv(2, 2, 2, tokens, 16, torch.bfloat16)
    num_tokens = first_token + tokens + after
    decoded = code(spec, kv, place_of(kv, first_token=first_token, num_tokens=num_tokens)).decode()
    for token in range(tokens):
        if first_token + token < spec.sink_tokens or first_token + token >= num_tokens - spec.tail_tokens:
            assert torch.equal(_bits(decoded[:, :, :, token]), _bits(kv[:, :, :, token]))


def test_recent_tokens_protected_layers_and_low_heads_have_their_levels() -> None:
    kv = _noise(dtype=torch.float32)
    spec = PLAIN.model_copy(update={"k": SMALL, "v": SMALL})
    base = (code(spec, kv).decode() - kv).pow(2)
    fine = Quantiser(levels=255)
    recent = spec.model_copy(update={"recent_tokens": 32, "k_recent": fine, "v_recent": fine})
    off = (code(recent, kv).decode() - kv).pow(2)
    assert torch.equal(off[:, :, :, :-32], base[:, :, :, :-32])
    assert off[:, :, :, -32:].mean() < base.mean() / 100
    protected = spec.model_copy(update={"protected_first": 1, "protected_last": 2, "k_protected_levels": 200})
    off = (code(protected, kv).decode() - kv).pow(2)
    assert torch.equal(off[:, 1], base[:, 1])
    assert torch.equal(off[1], base[1])
    assert off[[0, 2, 3], 0].mean() < base.mean() / 100
    low = protected.model_copy(update={"low_heads": ((1, 1), (0, 0)), "v_low_levels": 2})
    low_off = (code(low, kv).decode() - kv).pow(2)
    assert low_off[1, 1, 1].mean() > 1.5 * base[1, 1, 1].mean()
    low_off[1, 1, 1] = off[1, 1, 1]
    assert torch.equal(low_off, off)  # a protected layer has no low heads


def test_a_shard_codes_as_its_place_in_the_model_says() -> None:
    """Layers and heads have global numbers: two frames of one part each bring what one frame of all brings."""
    kv = _noise()
    spec = ladder(10_000.0)["x6"]
    whole = code(spec, kv).decode()
    place = FramePlace(Box(range(2, 4), range(1, 2), range(256)), 256, 4, 2)
    part = kv[2:, :, 1:].contiguous()
    assert torch.equal(code(spec, part, place).decode(), whole[2:, :, 1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["int8", "fp8", "x4", "x8"])
def test_what_cannot_be_coded_is_stored(name: str, value: float) -> None:
    kv = _noise()
    kv[2, 0, 1, 100, 5] = value
    frame = code(ladder()[name], kv)
    if value == 3e38 and name == "fp8":
        assert frame.decode().isfinite().all()
        return
    assert frame.params == STORED
    assert torch.equal(_bits(frame.decode()), _bits(kv))
    assert default_decoders()[frame.codec_id].is_exact(frame.params)


@pytest.mark.parametrize("name", [name for name in ladder() if name != "none"])
def test_a_frame_that_would_not_be_smaller_is_stored(name: str) -> None:
    kv = torch.randn((1, 2, 1, 1, 2), generator=torch.Generator().manual_seed(0)).bfloat16()
    frame = code(ladder()[name], kv)
    assert frame.payload_bytes == 8
    assert torch.equal(frame.decode(), kv)


def test_fp8_is_what_torch_makes_of_it() -> None:
    """Every bfloat16 that is not enormous, among neighbours of its own size and under a scale of 1."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    every = (bits[(bits & 0x7FFF) < 0x7F00] << 16).view(torch.float32)
    for kv in (every, torch.cat((every[every.abs() <= 448], torch.full((every.numel(),), 448.0)))):
        kv = kv[: kv.numel() // 512 * 512].view(2, 2, -1, 8, 16).bfloat16()
        frame = code(PipelineSpec(kind="fp8"), kv)
        x = kv.float()
        scale = x.abs().amax(-1, keepdim=True) / 448
        codes = torch.where(scale < 2.0**-126, 0, (x * (1 / scale)).clamp(-448, 448)).to(torch.float8_e4m3fn)
        assert torch.equal(frame.sections[0].view(torch.float32), scale.reshape(-1))
        assert torch.equal(frame.sections[1] & 0x7F, codes.view(torch.uint8).reshape(-1) & 0x7F)
        assert torch.equal(frame.decode(), (codes.float() * scale).bfloat16())


@pytest.mark.parametrize("name", [name for name, spec in ladder().items() if spec.kind != "none"])
def test_zeros_come_back_as_zeros(name: str) -> None:
    kv = torch.zeros((2, 2, 2, 100, 64), dtype=torch.bfloat16)
    assert not code(ladder(10_000.0)[name], kv).decode().any()


def test_every_rung_of_the_ladder_is_smaller_and_coarser_than_the_one_before() -> None:
    kv = random_kv(9, 4, 2, 600, 64, torch.bfloat16)
    found = {name: roundtrip(spec, kv, num_tokens=600) for name, spec in ladder(10_000.0).items()}
    raw_bytes = kv.numel() * 2
    assert found["none"][1] == raw_bytes + HEADER_BYTES
    assert torch.equal(found["lossless"][0], kv)
    rungs = {"lossless": 1.2, "fp8": 1.8, "int8": 1.9, "x4": 4, "x5": 5, "x6": 5.3, "x8": 6.1, "x10": 7.8, "x12": 9.3}
    for name, at_least in rungs.items():
        assert raw_bytes / found[name][1] > at_least, name


def test_roundtrip_counts_frames_and_pads_as_the_wire_does() -> None:
    kv = _noise(100)
    spec = ladder(10_000.0)["x8"]
    out, total = roundtrip(spec, kv, num_tokens=120, first_token=20, frame_tokens=48)
    expected = 0
    pieces = []
    for start in range(0, 100, 48):
        piece = kv[:, :, :, start : start + 48].contiguous()
        frame = code(spec, piece, place_of(piece, first_token=20 + start, num_tokens=120))
        expected += frame.payload_bytes + HEADER_BYTES
        pieces.append(frame.decode())
    assert total == expected
    assert torch.equal(out, torch.cat(pieces, 3))


def test_specs_are_plain_data() -> None:
    for spec in ladder(10_000.0).values():
        assert parse_config(PipelineSpec, spec.model_dump(mode="json"), source="test") == spec


@pytest.mark.parametrize(
    "bad",
    [
        {"levels": 1},
        {"levels": 257},
        {"levels": 4, "axis": "row"},
        {"levels": 4, "step_rms": 1.0},
        {"levels": 4, "axis": "tensor", "symmetric": False, "step_rms": 1.0},
        {"levels": 4, "symmetric": False, "clip": 0.5},
        {"levels": 4, "bits": 2},
    ],
)
def test_impossible_quantisers_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Quantiser.model_validate(bad)


def test_impossible_pipelines_are_refused() -> None:
    for bad in ({"low_heads": ((-1, 0),)}, {"k_protected_step_rms": 1.0}, {"rope_theta": 0.5}, {"seed": 2**32}):
        with pytest.raises(ValidationError):
            PipelineSpec.model_validate(bad)


def test_encoders_tell_what_they_are() -> None:
    ids = {name: open_encoder(spec).codec_id for name, spec in ladder().items()}
    assert ids == {**dict.fromkeys(ids, 2), "none": 0, "lossless": 1, "fp8": 3}
    for spec in ladder().values():
        encoder = open_encoder(spec)
        assert encoder.is_lossless == spec.is_lossless
        assert encoder.is_identity == (spec.kind == "none")
        assert [encoder.max_payload_bytes(size) for size in (0, 64, 4096)] == [0, 64, 4096]


def test_a_frame_may_be_decoded_from_memory_that_is_lent() -> None:
    frame = code(ladder()["x4"], _noise())
    decoded = frame.decode()
    kept = decoded.clone()
    for section in frame.sections:
        section.zero_()
    assert torch.equal(decoded, kept)
    assert torch.equal(replace(frame, sections=code(ladder()["x4"], _noise()).sections).decode(), kept)


def test_a_head_dim_past_the_largest_butterflies_is_stored() -> None:
    for head_dim, is_coded in ((2047, True), (2048, False)):
        kv = random_kv(4, 1, 1, 6, head_dim, torch.bfloat16)
        frame = code(PipelineSpec(rotate_v=True), kv)
        assert (frame.params != STORED) == is_coded
        assert frame.decode().shape == kv.shape
