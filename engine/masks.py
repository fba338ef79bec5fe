"""What a constraint allows, as bits, applied to logits. Pure but for the logits."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

_BITS = tuple(range(8))


def forbid(logits: torch.Tensor, masks: Mapping[int, NDArray[np.uint8]]) -> None:
    """Set the logits of all tokens without a bit to minus infinity.

    Args:
        logits: float32 [R, V], changed in place.
        masks: by row; V bits at least, the lowest first.
    """
    vocab_size = logits.shape[1]
    if logits.device.type == "cpu":
        values = logits.numpy()
        for row, mask in masks.items():
            allowed = np.unpackbits(mask, count=vocab_size, bitorder="little").view(np.bool_)
            np.putmask(values[row], ~allowed, -np.inf)
    else:
        _forbid_there(logits, masks)


def _forbid_there(logits: torch.Tensor, masks: Mapping[int, NDArray[np.uint8]]) -> None:
    """On any device: the bits travel, and are unpacked there."""
    packed = torch.from_numpy(np.stack(list(masks.values()))).to(logits.device)  # [K, bytes]
    shifts = torch.tensor(_BITS, dtype=torch.uint8, device=logits.device)
    is_allowed = ((packed[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
    rows = torch.tensor(list(masks), device=logits.device)
    logits[rows] = logits[rows].masked_fill(~is_allowed, -torch.inf)


def leaves_any(mask: NDArray[np.uint8], token_ids: NDArray[np.int64]) -> bool:
    """Whether the mask allows a token other than these."""
    others = mask.copy()
    inside = token_ids[token_ids < 8 * len(mask)]
    np.bitwise_and.at(others, inside // 8, ~(1 << (inside % 8)).astype(np.uint8))
    return bool(others.any())
