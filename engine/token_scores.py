"""Which prompt tokens matter to what comes next: scores for dropping the others when KV is handed over.

The score of a token is the attention that the last queries of the prompt (the window) pay to it, summed over queries,
heads and layers, and smoothed over its neighbours, since what matters comes in phrases. One score for all layers and
heads: the tokens that are kept then stay whole, in blocks.

Source: SnapKV (Li et al. 2024), there per head; heavy hitters are the idea of H2O (Zhang et al. 2023).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SMOOTHED_TOKENS = 5


def attention_to(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the attention that the last tokens of a prompt pay to each of its tokens in one layer. Pure.

    Args:
        queries: [W, H, D], of the last W tokens, rotary embedding applied.
        keys: [K, T, D]; query head h reads kv head ``h // (H // K)``.
    Returns:
        float32 [T], summing to ``W * H``.
    """
    window, num_heads, head_dim = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    grouped = queries.float().view(window, num_kv_heads, num_heads // num_kv_heads, head_dim)
    at = torch.arange(num_tokens, device=keys.device)
    is_later = at > torch.arange(num_tokens - window, num_tokens, device=keys.device)[:, None]
    total = torch.zeros(num_tokens, device=keys.device)
    for head in range(num_kv_heads):  # one at a time: all at once would be gigabytes for a long prompt
        scores = grouped[:, head].transpose(0, 1) @ keys[head].float().T * head_dim**-0.5  # [H / K, W, T]
        total += scores.masked_fill_(is_later, float("-inf")).softmax(-1).sum((0, 1))
    return total


def smooth(scores: Tensor) -> Tensor:
    """Return the mean of each score and its neighbours. Pure."""
    return torch.nn.functional.avg_pool1d(
        scores[None, None], SMOOTHED_TOKENS, stride=1, padding=SMOOTHED_TOKENS // 2, count_include_pad=False
    )[0, 0]


def score_tokens(layers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return float32 [T] scores from (queries, keys) of every layer. Pure."""
    total: Tensor | None = None
    for queries, keys in layers:
        attention = attention_to(queries, keys)
        total = attention if total is None else total + attention
    assert total is not None, "a model has layers"
    return smooth(total)
