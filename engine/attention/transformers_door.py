"""The door through which transformers' models call our attention.

transformers looks an attention function up by name; ours is registered as `ATTENTION_NAME`. No mask function is
registered under that name, so the models build no masks at all. The step's facts travel as the keyword argument
`step` from the model's call to every attention layer; there is no global context.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.errors import ConfigError
from engine.attention.base import AttentionBackend, write_tokens
from engine.forward import ForwardBatch
from engine.pool import KvPool

ATTENTION_NAME = "tandem_paged"
_REFUSED = ("softcap", "s_aux", "position_bias", "sinks")  # what would change the scores and is not computed here


@dataclass(frozen=True, slots=True)
class Step:
    """What attention layers need to know of the step. `layers_seen` is filled with the layers that called."""

    batch: ForwardBatch
    pool: KvPool
    backend: AttentionBackend
    plan: Any
    on_layer: Callable[[int], None] | None = None
    layers_seen: list[int] = field(default_factory=list)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write K and V [1, K, T, D] to the pool, then attend query [1, H, T, D]; returns [1, T, H, D].

    Raises:
        ConfigError: the model asks for scores that this backend does not compute (found by the probe at load).
    """
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise ConfigError(f"model.path: attention with {refused[0]} is not supported")
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    write_tokens(step.pool, layer_idx, step.batch.slot_mapping, key[0].transpose(0, 1), value[0].transpose(0, 1))
    step.layers_seen.append(layer_idx)
    if step.on_layer is not None:
        step.on_layer(layer_idx)
    rows = query[0].transpose(0, 1).contiguous()
    if step.batch.window_rows.shape[0]:
        step.batch.window_queries.append(rows[step.batch.window_rows])
    attended = step.backend.attend(rows, layer_idx, step.plan, scaling=scaling, window=sliding_window or 0)
    return attended.view(1, *rows.shape), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
