"""Getting ready to code: whatever is compiled on first use is compiled now. That takes seconds on a machine that never
did it before (then it is kept on disk), and no transfer would be given them."""

from collections.abc import Sequence

import torch

from core.layout import KvLayout
from kv_transfer.codec import TORCH_DTYPES
from kv_transfer.codecs.roundtrip import roundtrip
from kv_transfer.codecs.spec import PipelineSpec

_TOKENS = 64


def warm_up(pipelines: Sequence[PipelineSpec], layout: KvLayout) -> None:
    """Code and decode some noise of the model's shape under every pipeline. Blocking."""
    shape = (layout.num_layers, 2, layout.num_kv_heads, _TOKENS, layout.head_dim)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[layout.dtype])
    for pipeline in pipelines:
        roundtrip(pipeline, kv, num_tokens=_TOKENS)
