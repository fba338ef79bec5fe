"""Frames for the codec tests: KV of any shape, coded in place, with its sections at hand; and specs of every kind."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kv_transfer.box import Box
from kv_transfer.codec import RAW, FramePlace
from kv_transfer.codecs.pipeline import CODED_DECODERS, open_encoder
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.frame import MAX_PARAMS_BYTES, MAX_SECTIONS, section_spans

DECODERS = {decoder.codec_id: decoder for decoder in (RAW, *CODED_DECODERS)}


@dataclass(frozen=True)
class CodedFrame:
    """One frame as it would lie in a receive slot."""

    codec_id: int
    params: bytes
    sections: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def decode(self) -> Tensor:
        return DECODERS[self.codec_id].decode(self.params, list(self.sections), self.shape, self.dtype)

    def with_section(self, idx: int, section: Tensor) -> "CodedFrame":
        return replace(self, sections=(*self.sections[:idx], section, *self.sections[idx + 1 :]))

    @property
    def payload_bytes(self) -> int:
        return section_spans(tuple(section.numel() for section in self.sections))[-1].stop


def place_of(kv: Tensor, *, first_token: int = 0, num_tokens: int | None = None, first_layer: int = 0) -> FramePlace:
    """Return where `kv` lies: at the end of its prompt and of its model, unless told otherwise."""
    layers, _, heads, tokens, _ = kv.shape
    box = Box(range(first_layer, first_layer + layers), range(heads), range(first_token, first_token + tokens))
    return FramePlace(box, num_tokens or first_token + tokens, first_layer + layers, heads)


def code(spec: PipelineSpec, kv: Tensor, place: FramePlace | None = None) -> CodedFrame:
    """Encode, with what every encoder owes its caller."""
    encoder = open_encoder(spec)
    raw_bytes = kv.numel() * kv.element_size()
    bound = encoder.max_payload_bytes(raw_bytes)
    payload = torch.full((bound + 64,), 0xA5, dtype=torch.uint8)
    encoded = encoder.encode(kv, payload, place or place_of(kv))
    spans = section_spans(encoded.section_bytes)
    assert spans[-1].stop <= bound
    assert bool((payload[bound:] == 0xA5).all()), "written past the bound"
    assert len(encoded.params) <= MAX_PARAMS_BYTES
    assert len(spans) <= MAX_SECTIONS
    sections = tuple(payload[span.start : span.stop].clone() for span in spans)
    return CodedFrame(encoder.codec_id, encoded.params, sections, tuple(kv.shape), kv.dtype)


def random_kv(seed: int, layers: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return KV with what makes real KV hard: channels of unlike size, K with steady offsets, a loud token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, 2, heads, tokens, head_dim)
    kv = torch.randn(shape, generator=generator) * torch.randn(head_dim, generator=generator).exp()
    kv[:, 0] += 4 * torch.randn(head_dim, generator=generator)
    kv[:, :, :, 0] *= 10
    return kv.to(dtype)


@st.composite
def quantisers(draw: st.DrawFn) -> Quantiser:
    axis = draw(st.sampled_from(("token", "group", "channel", "tensor")))
    symmetric = draw(st.booleans())
    step_rms = draw(st.none() | st.floats(0.05, 3.0)) if axis == "tensor" and symmetric else None
    return Quantiser(
        levels=draw(st.sampled_from((2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 63, 255, 256))),
        axis=axis,
        group_tokens=draw(st.integers(1, 40)),
        symmetric=symmetric,
        clip=draw(st.floats(0.3, 1.0)) if symmetric else 1.0,
        step_rms=step_rms,
    )


@st.composite
def quantised_specs(draw: st.DrawFn) -> PipelineSpec:
    """Every stage on or off, independently."""
    levels = st.none() | st.sampled_from((2, 9, 16, 64))
    return PipelineSpec(
        sink_tokens=draw(st.integers(0, 5)),
        tail_tokens=draw(st.integers(0, 5)),
        rope_theta=draw(st.none() | st.sampled_from((10_000.0, 500_000.0))),
        center_k=draw(st.booleans()),
        center_v=draw(st.booleans()),
        rotate_k=draw(st.booleans()),
        rotate_v=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
        k=draw(quantisers()),
        v=draw(quantisers()),
        recent_tokens=draw(st.integers(0, 30)),
        k_recent=draw(st.none() | quantisers()),
        v_recent=draw(st.none() | quantisers()),
        protected_first=draw(st.integers(0, 2)),
        protected_last=draw(st.integers(0, 2)),
        k_protected_levels=draw(levels),
        v_protected_levels=draw(levels),
        low_heads=draw(st.sampled_from(((), ((0, 0),), ((1, 1), (2, 0))))),
        k_low_levels=draw(levels),
        v_low_levels=draw(levels),
        entropy=draw(st.sampled_from(("none", "zstd"))),
    )
