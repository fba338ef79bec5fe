"""The quantised codec on a CUDA device: the same bytes as on the host, and the same values back."""

import pytest
import torch

from kv_transfer.box import Box
from kv_transfer.codec import FramePlace
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.quantised import QuantisedDecoder
from kv_transfer.frame import section_spans
from tests.unit.test_kv_codec_triton import SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUANTISED = {**SPECS, **{name: spec for name, spec in ladder().items() if spec.kind == "quantised"}}


@pytest.mark.parametrize("head_dim", [64, 80, 128])  # 80 is no power of two: it goes over the host
@pytest.mark.parametrize("num_tokens", [1, 37, 512])
@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_a_frame_has_the_same_bytes_and_values(name: str, num_tokens: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(3, 2, 4, num_tokens, head_dim, generator=generator).to(torch.bfloat16)
    place = FramePlace(Box(range(3), range(4), range(num_tokens)), num_tokens, 3, 4)
    encoder = open_encoder(QUANTISED[name])
    payloads, params = [], []
    for tensor in (kv, kv.cuda()):
        payload = torch.zeros(kv.nbytes, dtype=torch.uint8)
        encoded = encoder.encode(tensor, payload, place)
        spans = section_spans(encoded.section_bytes)
        payloads.append([payload[span.start : span.stop] for span in spans])
        params.append(encoded.params)
    assert params[0] == params[1]
    assert all(torch.equal(mine, other) for mine, other in zip(*payloads, strict=True))
    wanted = QuantisedDecoder().decode(params[0], payloads[0], kv.shape, kv.dtype)
    found = QuantisedDecoder(torch.device("cuda")).decode(params[0], payloads[0], kv.shape, kv.dtype)
    assert torch.equal(found.cpu(), wanted)
