"""Plain quantisers of KV that a rung of the ladder has to beat at equal bytes: by token, KIVI-like, CacheGen-like.

Each takes canonical KV ``[L, 2, K, T, D]`` of one prompt and returns (what would arrive, bytes on the wire). They are
written from the papers' descriptions and made generous: no frame headers are counted, and CacheGen's entropy coder is
counted as its ideal, the empirical entropy by (layer, K or V, channel), with no cost for its tables. Levels are free
integers, so that each can be made as large as a rung is.

- by token: every (layer, K or V, head, token) has its least value and its step, 16 bits each, over head_dim.
- KIVI (Liu et al. 2024): K by channel in groups of 32 tokens, V by token, both asymmetric with 16-bit scales and least
  values; the tokens that fill no group, and the most recent group, stay as they are.
- CacheGen (Liu et al. 2024): by token over all heads and channels of a layer, symmetric about zero; K of the first
  third of the layers has twice the levels; V of the first two layers likewise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_TOKENS = 32
Coded = tuple[Tensor, float]  # what arrives, bytes


@dataclass(frozen=True, slots=True)
class Baseline:
    """One quantiser with its knob. `code(kv, levels)`; more levels are more bytes and less error."""

    name: str
    code: Callable[[Tensor, float], Coded]


def by_token(kv: Tensor, levels: float) -> Coded:
    """Asymmetric, one scale and least value per token and head; symbols at log2(levels) bits."""
    coded, scales = _min_max(kv.float(), (-1,), _count(levels))
    return coded.to(kv.dtype), kv.numel() * math.log2(_count(levels)) / 8 + 4 * scales


def kivi(kv: Tensor, levels: float) -> Coded:
    """K by channel in groups of tokens, V by token; the last tokens raw."""
    count = _count(levels)
    num_tokens = kv.shape[3]
    coded_tokens = max(0, num_tokens // GROUP_TOKENS - 1) * GROUP_TOKENS
    out = kv.clone()
    head = kv[:, :, :, :coded_tokens].float()
    num_bytes = float((kv.numel() - head.numel()) * kv.element_size())
    if coded_tokens:
        keys = head[:, 0].reshape(*head.shape[:1], head.shape[2], -1, GROUP_TOKENS, head.shape[4])
        coded_keys, key_scales = _min_max(keys, (-2,), count)
        coded_values, value_scales = _min_max(_in_groups(head[:, 1]), (-1,), count)
        out[:, 0, :, :coded_tokens] = coded_keys.flatten(2, 3).to(kv.dtype)
        out[:, 1, :, :coded_tokens] = coded_values.flatten(-2).to(kv.dtype)
        num_bytes += head.numel() * math.log2(count) / 8 + 4 * (key_scales + value_scales)
    return out, num_bytes


def cachegen(kv: Tensor, levels: float) -> Coded:
    """By token over a layer, symmetric, levels by depth; ideal entropy by channel."""
    num_layers = kv.shape[0]
    out, num_bytes = kv.clone(), 0.0
    for layer in range(num_layers):
        is_early = (layer < math.ceil(num_layers / 3), layer < 2)
        for half in (0, 1):
            count = _count(levels * (2.0 if is_early[half] else 1.0))
            part = kv[layer, half].float()  # [K, T, D]
            most = max(1.0, (count - 1) / 2)
            step = part.abs().amax(dim=(0, 2), keepdim=True).clamp_min(1e-12) / most
            symbols = (part / step).round()
            out[layer, half] = (symbols * step).to(kv.dtype)
            num_bytes += _entropy_bytes(symbols.long()) + 2 * part.shape[1]
    return out, num_bytes


BASELINES = (Baseline("by token", by_token), Baseline("KIVI-like", kivi), Baseline("CacheGen-like", cachegen))


def levels_of_prompt(levels: float, prompt_idx: int) -> float:
    """Return whole levels of one prompt; prompts together then have `levels`, and bytes come in fine steps. Pure."""
    return float(math.floor(levels + prompt_idx * 0.618034 % 1.0))


def levels_for(baseline: Baseline, kvs: list[Tensor], ratio: float) -> float | None:
    """Return the levels with which `kvs` are `ratio` times smaller, never less bytes; None: not even 2 are so small."""
    raw = sum(kv.numel() * kv.element_size() for kv in kvs)

    def ratio_at(levels: float) -> float:
        return raw / sum(baseline.code(kv, levels_of_prompt(levels, at))[1] for at, kv in enumerate(kvs))

    low, high = 2.0, 256.0
    if ratio_at(low) < ratio:
        return None
    for _ in range(11):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ratio_at(middle) >= ratio else (low, middle)
    return high


def _in_groups(values: Tensor) -> Tensor:
    """View [.., D] as [.., D / group, group]."""
    return values.reshape(*values.shape[:-1], -1, min(GROUP_TOKENS, values.shape[-1]))


def _count(levels: float) -> int:
    return max(2, math.floor(levels + 1e-9))


def _min_max(part: Tensor, dims: tuple[int, ...], count: int) -> tuple[Tensor, int]:
    """Quantise between the least and the largest value over `dims`; return it with the number of scales."""
    least = part.amin(dim=dims, keepdim=True)
    step = ((part.amax(dim=dims, keepdim=True) - least) / (count - 1)).clamp_min(1e-12)
    return ((part - least) / step).round() * step + least, step.numel()


def _entropy_bytes(symbols: Tensor) -> float:
    """Return the bytes of an ideal coder with one table per channel; symbols [K, T, D]."""
    rows = symbols.permute(0, 2, 1).flatten(0, 1)
    rows = rows - rows.min()
    counts = torch.zeros((rows.shape[0], int(rows.max()) + 1)).scatter_add_(1, rows, torch.ones(rows.shape))
    share = counts / rows.shape[1]
    return float(-(counts * torch.where(share > 0, share, torch.ones(())).log2()).sum()) / 8
