"""Matrix products of the CPU path, with weights in the layout that the machine's kernels read fastest.

oneDNN keeps a weight in blocks of its own; `F.linear` would convert it on every call (or, in float32, go through MKL,
which on AMD processors takes its slow path). Converted once, a product is 1.1 to 3 times as fast (more for few rows),
and one layout serves every number of rows. Where oneDNN cannot, the plain weight is kept.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

_PACK_FOR_ROWS = 16  # hint to the layout search; measured to be as good as any for 1 to 2,048 rows


class PackedLinear:
    """``x @ weight.T + bias`` for x [T, in], with the outputs of several layers side by side.

    The weight is copied; the given parameters may be freed.
    """

    def __init__(self, parts: Sequence[torch.nn.Linear]) -> None:
        weight = torch.cat([part.weight.detach() for part in parts])
        biases = [part.bias for part in parts]
        if any(bias is not None for bias in biases):
            filled = [
                torch.zeros(part.out_features, dtype=weight.dtype) if bias is None else bias.detach()
                for part, bias in zip(parts, biases, strict=True)
            ]
            self._bias: torch.Tensor | None = torch.cat(filled)
        else:
            self._bias = None
        self._packed = _can_pack(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed and _MULTIPLY is not None:
            product: torch.Tensor = _MULTIPLY(x, self._weight, self._bias, "none", [], "")
            return product
        return linear(x, self._weight, self._bias)


def _can_pack(dtype: torch.dtype) -> bool:
    if _MULTIPLY is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# Absent from builds without oneDNN. Resolved once: resolving it on every call costs as much as a small product.
_MULTIPLY = torch.ops.mkldnn._linear_pointwise.default if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
