"""What the engine asks of its model and of those who watch it, and the facts that it answers with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from core.errors import ServingError
from core.ids import RequestId
from engine.checkpoint import ModelInfo
from engine.forward import ForwardBatch
from engine.pool import KvPool


class Runner(Protocol):
    """The model: what `engine.runner.ModelRunner` is, and what a test may put in its place."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def pool(self) -> KvPool: ...

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Compute the batch into the pool; return float32 logits [R, V], which the caller may overwrite.

        Args:
            on_layer: called with a layer's index once its K and V of the whole batch are in the pool.
        """
        ...

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, V] of R rows of a batch's `scored_states`; the caller may overwrite them."""
        ...


class PrefillObserver(Protocol):
    """Told, on the engine thread, which KV of a prefill is in the pool. Must not block."""

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        """These layers of these prompt positions can be read until the lease ends.

        Called once for a cached prefix (all layers) when the request is first scheduled, then for each (layer group,
        chunk) as soon as the last layer of the group has run: together every layer of every position exactly once.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """`held_tokens`: leading prompt tokens whose KV is here already and need not be sent."""

    held_tokens: int


class StepFailed(ServingError):
    """The forward pass or the sampling of a step failed. The requests of that step are as before it; abort them."""

    def __init__(self, request_ids: tuple[RequestId, ...], cause: BaseException) -> None:
        line = next((line for line in str(cause).splitlines() if line.strip()), "")
        super().__init__(f"engine step failed: {type(cause).__name__}: {line.strip()}")
        self.request_ids = request_ids


class NoFiniteLogits(ServingError):
    """The model's logits for a request's next token are not numbers to choose by; only that request is lost."""

    def __init__(self) -> None:
        super().__init__("the model computed no finite logits for the next token")
