"""What a pipeline costs, measured on real KV: the ratio that it reaches and the seconds that one core needs.

Cheap (no model is asked), so it is done for every candidate. Times are fitted to a straight line over the raw bytes of
a frame, from frames of two sizes; of several runs the fastest counts: what else the machine did is not the codec's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_transfer.box import Box
from kv_transfer.codec import FramePlace, default_decoders
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.roundtrip import roundtrip
from kv_transfer.codecs.spec import PipelineSpec
from kv_transfer.frame import section_spans
from kv_transfer.profile import CodecTime

COST_PROMPTS = 9  # one of each stratum: what a ratio is judged on where no answers are
SMALL_TOKENS, LARGE_TOKENS = 64, 512
_RUNS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Attributes: ratio with everything that is sent; times of one frame on one core."""

    ratio: float
    encode: CodecTime
    decode: CodecTime

    def codec_s(self, raw_bytes: int) -> float:
        """Return the seconds of both directions. Pure."""
        return self.encode.seconds(raw_bytes) + self.decode.seconds(raw_bytes)

    def to_row(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "encode": self.encode.model_dump(), "decode": self.decode.model_dump()}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Cost":
        return cls(row["ratio"], CodecTime(**row["encode"]), CodecTime(**row["decode"]))


def measure_cost(spec: PipelineSpec, kvs: Sequence[Tensor], frame_tokens: int) -> Cost:
    """Return the cost of a pipeline.

    Args:
        kvs: canonical KV of whole prompts, ``[L, 2, K, T, D]``; one at least as long as a large frame.
        frame_tokens: of a frame as served.
    """
    raw = wire = 0
    for kv in kvs:
        raw += kv.numel() * kv.element_size()
        sent = _kept(spec, kv)
        wire += roundtrip(spec, sent, num_tokens=sent.shape[3], frame_tokens=frame_tokens)[1]
    longest = max(kvs, key=lambda kv: kv.shape[3])
    small, large = (longest[:, :, :, :size].contiguous() for size in (SMALL_TOKENS, LARGE_TOKENS))
    small_s, large_s = (frame_seconds(spec, _kept(spec, part)) for part in (small, large))
    sizes = tuple(part.numel() * part.element_size() for part in (small, large))
    return Cost(raw / wire, *(_line(sizes, (at[0], at[1])) for at in zip(small_s, large_s, strict=True)))


def _kept(spec: PipelineSpec, kv: Tensor) -> Tensor:
    """Return as many tokens as a profile hands over, evenly spread: which ones is no matter to the cost. Pure."""
    if spec.selection is None:
        return kv
    num_kept = spec.selection.num_kept(kv.shape[3])
    return kv[:, :, :, torch.linspace(0, kv.shape[3] - 1, num_kept).long()].contiguous()


def frame_seconds(spec: PipelineSpec, kv: Tensor) -> tuple[float, float]:
    """Return (encode, decode) seconds of one frame, the fastest of some runs after a warm-up."""
    encoder = open_encoder(spec)
    payload = torch.empty(encoder.max_payload_bytes(kv.numel() * kv.element_size()), dtype=torch.uint8)
    layers, _, heads, tokens, _ = kv.shape
    place = FramePlace(Box(range(layers), range(heads), range(tokens)), 4 * tokens, layers, heads)
    decoder = default_decoders()[encoder.codec_id]
    encode_s = decode_s = float("inf")
    for _ in range(1 + _RUNS):
        started = time.perf_counter()
        encoded = encoder.encode(kv, payload, place)
        coded = time.perf_counter()
        sections = [payload[span.start : span.stop] for span in section_spans(encoded.section_bytes)]
        decoder.decode(encoded.params, sections, kv.shape, kv.dtype)
        encode_s, decode_s = min(encode_s, coded - started), min(decode_s, time.perf_counter() - coded)
    return encode_s, decode_s


def _line(sizes: tuple[int, ...], seconds: tuple[float, float]) -> CodecTime:
    """Pure. Through two points; neither part is negative."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    fixed = seconds[0] - slope * sizes[0]
    if fixed < 0:
        return CodecTime(fixed_s=0.0, s_per_byte=seconds[1] / sizes[1])
    return CodecTime(fixed_s=fixed, s_per_byte=slope)
