"""An engine over `tests.fake_model` for one worker of a pair, with gates that hold it in the middle of something."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from core.ids import RequestId
from engine.config import EngineConfig
from engine.engine import Engine
from engine.forward import ForwardBatch
from tests.fake_model import FakeRunner

PATIENCE_S = 20.0  # a deadline, not a duration: only a hang uses it up


class Gate:
    """Open at first. What passes through it waits while it is closed, and tells that it came."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()
        self._num_free = 0

    def close(self, after: int = 0) -> None:
        """`after`: so many pass first."""
        self._num_free = after
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            if self._num_free:
                self._num_free -= 1
                return
            self._reached.set()
            assert self._open.wait(PATIENCE_S), "a test left its gate closed"

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)


class GatedRunner(FakeRunner):
    def __init__(self, gate: Gate, num_blocks: int) -> None:
        super().__init__(num_blocks=num_blocks)
        self._gate = gate

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        self._gate.pass_through()
        return super().forward(batch, on_layer)


class GatedEngine(Engine):
    """`copying` holds KV on its way into this pool."""

    copying: Gate

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: torch.Tensor, heads: range | None = None
    ) -> None:
        self.copying.pass_through()
        super().write_kv(request_id, layers, tokens, kv, heads)


@dataclass
class Side:
    """One worker's engine, and the gates that hold it."""

    num_blocks: int
    max_batch_tokens: int
    computing: Gate = field(default_factory=Gate)
    copying: Gate = field(default_factory=Gate)
    engine: GatedEngine | None = None
    runner: GatedRunner | None = None

    def load(self, config: object, progress: Callable[[str, float], None]) -> Engine:
        progress("loading a fake", 0.5)
        self.runner = GatedRunner(self.computing, self.num_blocks)
        self.engine = GatedEngine(
            self.runner,
            EngineConfig(
                block_size=4, num_blocks=self.num_blocks, max_batch_tokens=self.max_batch_tokens, layer_group_size=2
            ),
        )
        self.engine.copying = self.copying
        return self.engine


def check_empty(engine: Engine) -> None:
    """Assert, on its thread or after that has ended, that every block is free or cached and no request is left."""
    engine.check()
    load = engine.load_report()
    assert (load.free_blocks, load.num_running, load.num_waiting) == (load.total_blocks, 0, 0)
    assert not engine.request_ids
