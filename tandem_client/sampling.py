"""How to choose tokens, as keyword arguments; what is left out takes the gateway's default (protos/inference.proto)."""

from collections.abc import Mapping, Sequence
from typing import TypedDict


class Sampling(TypedDict, total=False):
    """Keyword arguments of `Client.generate`. Ranges are checked by the gateway, which names the offending field."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    max_tokens: int
    seed: int
    logprobs: int
