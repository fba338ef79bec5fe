"""KV on its way out of and into this engine, copied by other threads while the engine steps.

The engine thread opens a hold on the blocks of a request (to be read, or to be written), transfer threads copy frames
through it, the engine thread closes it. A copy pins its hold: what is closed while pinned is not free yet, its blocks
are quarantined until the last copy ends. So an abort at any moment is safe, and nobody waits for anybody.

Concurrency: the lock guards the table of holds and their counts, never a copy. Copies run beside the forward pass
because they touch other blocks, or computed positions that nobody writes again. A block table given to `open_*` does
not change while the hold is open.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ServingError, TransferError
from core.ids import RequestId
from core.layout import KvLayout
from engine.pool import KvPool


class NoSuchHandoff(ServingError):
    """This engine holds no KV of that request for a hand-off: never did, or its lease or reservation has ended."""

    grpc_code = "NOT_FOUND"
    http_status = 404

    def __init__(self, request_id: RequestId) -> None:
        super().__init__(f"request {request_id}: no KV is held for a hand-off")


class _Hold:
    """Blocks of one request. `missing` is set if and only if they are to be written: parts that have not landed."""

    __slots__ = ("block_ids", "is_closed", "missing", "num_tokens", "pins", "written_from")

    def __init__(
        self, block_ids: torch.Tensor, num_tokens: int, written_from: int, layout: KvLayout | None = None
    ) -> None:
        self.block_ids = block_ids
        self.num_tokens = num_tokens
        self.written_from = written_from
        self.missing: NDArray[np.bool_] | None = None
        if layout is not None:
            self.missing = np.ones((layout.num_layers, layout.num_kv_heads, num_tokens - written_from), np.bool_)
        self.pins = 0
        self.is_closed = False


class HandoffTable:
    """All holds of one engine."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._all_heads = range(pool.layout.num_kv_heads)
        self._lock = Lock()
        self._holds: dict[RequestId, _Hold] = {}
        self._drained: list[_Hold] = []
        # Called from the copying thread when a closed hold lost its last pin; must not block.
        self.on_drained: Callable[[], None] = lambda: None

    def open_reading(self, request_id: RequestId, block_ids: NDArray[np.int32], num_tokens: int) -> None:
        """Let `read` copy positions 0..num_tokens of these blocks. What is computed so far the caller must know."""
        self._open(request_id, _Hold(self._on_device(block_ids), num_tokens, 0))

    def open_writing(self, request_id: RequestId, block_ids: NDArray[np.int32], tokens: range) -> None:
        """Let `write` fill positions `tokens` of these blocks, in all layers."""
        self._open(request_id, _Hold(self._on_device(block_ids), tokens.stop, tokens.start, self._pool.layout))

    def read(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: torch.Tensor | None = None,
        heads: range | None = None,
    ) -> torch.Tensor:
        """Copy a frame out; any thread. Raises as `Engine.read_kv`."""
        heads = self._all_heads if heads is None else heads
        with self._pinned(request_id, layers, tokens, heads, is_write=False) as hold:
            return self._pool.read(hold.block_ids, layers, tokens, out, heads)

    def read_some(self, request_id: RequestId, layers: range, tokens: torch.Tensor, heads: range) -> torch.Tensor:
        """Copy a frame of some tokens out; any thread. Raises as `Engine.read_tokens`."""
        hull = range(int(tokens.min()), int(tokens.max()) + 1)
        with self._pinned(request_id, layers, hull, heads, is_write=False) as hold:
            return self._pool.read_some(hold.block_ids, layers, tokens, heads)

    def read_keys(self, request_id: RequestId, tokens: range) -> Iterator[torch.Tensor]:
        """Copy K out, one layer after the other [K, T, D]; any thread. Raises as `Engine.read_kv`."""
        for at in range(self._pool.layout.num_layers):
            yield self.read(request_id, range(at, at + 1), tokens)[0, 0]

    def write(
        self, request_id: RequestId, layers: range, tokens: range, kv: torch.Tensor, heads: range | None = None
    ) -> None:
        """Copy a frame in; any thread. Raises as `Engine.write_kv`."""
        heads = self._all_heads if heads is None else heads
        expected = self._pool.frame_shape(layers, tokens, heads)
        if tuple(kv.shape) != expected or kv.dtype != self._pool.kv.dtype:
            raise TransferError("shape", f"frame is {kv.dtype} {list(kv.shape)}, expected {list(expected)}")
        with self._pinned(request_id, layers, tokens, heads, is_write=True) as hold:
            self._pool.write(hold.block_ids, layers, tokens, kv, heads)
            with self._lock:
                assert hold.missing is not None
                part = range(tokens.start - hold.written_from, tokens.stop - hold.written_from)
                hold.missing[layers.start : layers.stop, heads.start : heads.stop, part.start : part.stop] = False

    def check_complete(self, request_id: RequestId, num_dropped: int = 0) -> None:
        """Engine thread: make sure that everything has been written and nobody is writing.

        Args:
            num_dropped: so many of the last places need not be written.
        Raises:
            NoSuchHandoff: nothing is held.
            TransferError: a part is missing or being written.
        """
        with self._lock:
            hold = self._hold(request_id)
            missing = None if hold.missing is None else hold.missing[:, :, : hold.missing.shape[2] - num_dropped]
            if hold.pins or missing is None or missing.any():
                left = 0 if missing is None else int(missing.any(axis=(0, 1)).sum())
                raise TransferError("incomplete", f"KV of {left} tokens has not landed, {hold.pins} writes in progress")

    def close(self, request_id: RequestId) -> object | None:
        """Engine thread: end the hold, if there is one; later reads and writes are refused.

        Returns:
            None when its blocks may be reused at once; otherwise a token that `take_drained` will return.
        """
        with self._lock:
            hold = self._holds.pop(request_id, None)
            if hold is None:
                return None
            hold.is_closed = True
            return hold if hold.pins else None

    def close_unused(self, request_id: RequestId) -> bool:
        """Engine thread: as `close`, unless a copy is in progress: then nothing changes, and the answer is False."""
        with self._lock:
            hold = self._holds.get(request_id)
            if hold is not None and hold.pins:
                return False
            self._holds.pop(request_id, None)
            return True

    def take_drained(self) -> list[object]:
        """Engine thread: return the tokens of closed holds whose last copy has ended since the last call."""
        if not self._drained:  # read without the lock: what comes in this moment is seen by the next call
            return []
        with self._lock:
            drained: list[object] = [*self._drained]
            self._drained.clear()
            return drained

    def _open(self, request_id: RequestId, hold: _Hold) -> None:
        with self._lock:
            assert request_id not in self._holds
            self._holds[request_id] = hold

    def _hold(self, request_id: RequestId) -> _Hold:
        hold = self._holds.get(request_id)
        if hold is None:
            raise NoSuchHandoff(request_id)
        return hold

    @contextmanager
    def _pinned(
        self, request_id: RequestId, layers: range, tokens: range, heads: range, *, is_write: bool
    ) -> Iterator[_Hold]:
        with self._lock:
            hold = self._hold(request_id)
            if is_write is (hold.missing is None):
                raise TransferError("direction", "the request is held for reading" if is_write else "not computed here")
            is_inside = (
                0 <= layers.start < layers.stop <= self._pool.layout.num_layers
                and hold.written_from <= tokens.start < tokens.stop <= hold.num_tokens
                and 0 <= heads.start < heads.stop <= self._pool.layout.num_kv_heads
                and layers.step == tokens.step == heads.step == 1
            )
            if not is_inside:
                raise TransferError(
                    "range",
                    f"layers {layers}, heads {heads}, tokens {tokens} are outside of layers "
                    f"0..{self._pool.layout.num_layers}, heads 0..{self._pool.layout.num_kv_heads}, "
                    f"tokens {hold.written_from}..{hold.num_tokens}",
                )
            hold.pins += 1
        try:
            yield hold
        finally:
            with self._lock:
                hold.pins -= 1
                is_drained = hold.is_closed and hold.pins == 0
                if is_drained:
                    self._drained.append(hold)
            if is_drained:
                self.on_drained()

    def _on_device(self, block_ids: NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(block_ids.astype(np.int64)).to(self._pool.kv.device)
