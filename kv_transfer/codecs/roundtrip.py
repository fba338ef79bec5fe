"""KV through a pipeline and back, as the wire would do it: for those who measure quality and ratio."""

import torch
from torch import Tensor

from kv_transfer.box import Box
from kv_transfer.codec import RAW, FramePlace
from kv_transfer.codecs.pipeline import CODED_DECODERS, open_encoder
from kv_transfer.codecs.spec import PipelineSpec
from kv_transfer.frame import HEADER_BYTES, section_spans

_DECODERS = {decoder.codec_id: decoder for decoder in (RAW, *CODED_DECODERS)}


def roundtrip(
    spec: PipelineSpec,
    kv: Tensor,
    *,
    num_tokens: int,
    first_token: int = 0,
    frame_tokens: int | None = None,
) -> tuple[Tensor, int]:
    """Encode and decode the KV of one prompt, or of a part of it. Pure.

    Args:
        kv: canonical ``[L, 2, K, T, D]`` of all layers and heads; T may be less than num_tokens.
        num_tokens: of the whole prompt.
        first_token: of the prompt, where `kv` starts.
        frame_tokens: cut into frames of that many tokens; None: one frame.

    Returns:
        What the receiver would write, and all the bytes that went over the wire, frame headers included.
    """
    encoder = open_encoder(spec)
    layers, _, heads, tokens, _ = kv.shape
    step = frame_tokens or tokens
    pieces: list[Tensor] = []
    total = 0
    payload = torch.empty(encoder.max_payload_bytes(kv.numel() * kv.element_size()), dtype=torch.uint8)
    for start in range(0, tokens, step):
        piece = kv[:, :, :, start : start + step].contiguous()
        span = range(first_token + start, first_token + start + piece.shape[3])
        place = FramePlace(Box(range(layers), range(heads), span), num_tokens, layers, heads)
        encoded = encoder.encode(piece, payload, place)
        spans = section_spans(encoded.section_bytes)
        sections = [payload[section.start : section.stop] for section in spans]
        decoded = _DECODERS[encoder.codec_id].decode(encoded.params, sections, piece.shape, kv.dtype)
        pieces.append(decoded.clone())
        total += spans[-1].stop + HEADER_BYTES
    return torch.cat(pieces, dim=3), total
