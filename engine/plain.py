"""A model as transformers has it, with our attention in its layers."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from core.errors import ConfigError
from engine.attention.base import AttentionBackend
from engine.attention.transformers_door import Step
from engine.forward import ForwardBatch
from engine.pool import KvPool


class PlainDecoder:
    """A whole model: token ids in, float32 logits out.

    Concurrency: one forward at a time.
    """

    def __init__(self, model: PreTrainedModel, pool: KvPool, backend: AttentionBackend) -> None:
        """Put a shunt between the layers and the head of `model`."""
        self._model = model
        self._pool, self._backend = pool, backend
        self._layers = _Shunt(getattr(model, model.base_model_prefix))
        setattr(model, model.base_model_prefix, self._layers)

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None) -> torch.Tensor:
        """Return float32 logits [R, V]; K and V of the batch are in the pool."""
        return self._call(batch, Step(batch, self._pool, self._backend, self._backend.plan(batch), on_layer))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, V] of hidden states [R, hidden size] that the layers computed."""
        return _logits(self._model(states=states[None], use_cache=False))

    def probe(self, batch: ForwardBatch, num_layers: int) -> None:
        """Compute `batch`.

        Raises:
            ConfigError: not every layer goes through the paged attention.
        """
        step = Step(batch, self._pool, self._backend, self._backend.plan(batch))
        self._call(batch, step)
        if step.layers_seen != list(range(num_layers)):
            raise ConfigError(
                f"model.path: model type {self._model.config.model_type} is not supported: "
                "its layers do not use the common attention interface"
            )

    def _call(self, batch: ForwardBatch, step: Step) -> torch.Tensor:
        result: Any = self._model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.logits_rows,
            step=step,
        )
        return _logits(result)


class _Shunt(torch.nn.Module):
    """Stands where a model has its layers: runs them, or, given what they computed before, leaves them out.

    What a family does to its logits behind the head (scaling, capping) is in the model's own forward; so that is called
    for some rows of hidden states, too.
    """

    def __init__(self, layers: torch.nn.Module) -> None:
        super().__init__()
        self._layers = layers

    def forward(self, *args: Any, states: torch.Tensor | None = None, step: Step | None = None, **kwargs: Any) -> Any:
        if states is not None:
            return BaseModelOutputWithPast(last_hidden_state=states)
        result = self._layers(*args, step=step, **kwargs)
        if step is not None and step.batch.scored_rows.shape[0]:
            step.batch.scored_states.append(result.last_hidden_state[0, step.batch.scored_rows])
        return result


def _logits(result: Any) -> torch.Tensor:
    logits: torch.Tensor = result.logits[0].float()
    return logits
