"""The KV pool of the soak: blocks with one owner each, which notices every access that the ports forbid.

Blocks that nobody owns hold a canary, and so does the prefix that a receiver holds already; both are looked at again
when a transfer ends and when everything is quiet. Every write is compared with the sender's KV on the spot: bit for bit
under a lossless profile. What is wrong is noted, never raised: one run tells all of it.
"""

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.errors import RejectedError, RejectReason
from core.ids import RequestId
from core.layout import KvLayout
from kv_transfer.codec import TORCH_DTYPES

CANARY = -768.0  # exact in every dtype, and nothing that a Gaussian gives
SLOW_ACCESS_S = 0.02


@dataclass
class Ledger:
    """What went wrong, and which faults were really injected. Any thread."""

    violations: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def violated(self, what: str) -> None:
        with self._lock:
            self.violations.append(what)

    def injected(self, fault: str) -> None:
        with self._lock:
            self.faults[fault] += 1


@dataclass(slots=True)
class Mischief:
    """What the pool does to one request: fails its n-th access, as a refusal or as a defect, or takes its time."""

    fails_at: int | None = None
    is_defect: bool = False
    is_slow: bool = False
    num_accesses: int = 0


@dataclass(slots=True)
class _Table:
    blocks: list[int]
    num_tokens: int
    num_inside: int = 0
    mischief: Mischief | None = None


class OwnedPool:
    """Reader and writer of one worker. `allocate`, `free` and the checks: event loop; accesses: any thread."""

    def __init__(self, name: str, layout: KvLayout, num_blocks: int, ledger: Ledger, truth: dict[RequestId, Tensor]):
        """`truth`: the KV of every live request, as computed; the sender's blocks are filled from it."""
        self.name = name
        self._layout = layout
        self._ledger = ledger
        self._truth = truth
        self._lossy: set[RequestId] = set()
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self._kv = torch.full(shape, CANARY, dtype=TORCH_DTYPES[layout.dtype])
        self._free = deque(range(num_blocks))
        self._num_blocks = num_blocks
        self._tables: dict[RequestId, _Table] = {}
        self._lock = threading.Lock()

    # --- the owner ----------------------------------------------------------------------------------------------------

    def allocate(self, request_id: RequestId, num_tokens: int, mischief: Mischief | None = None) -> None:
        blocks = [self._free.popleft() for _ in range(-(-num_tokens // self._layout.block_size))]
        with self._lock:
            self._tables[request_id] = _Table(blocks, num_tokens, mischief=mischief)

    def fill(self, request_id: RequestId) -> None:
        """Write what the prefill computed, block by block."""
        table, kv, size = self._tables[request_id], self._truth[request_id], self._layout.block_size
        for index, block in enumerate(table.blocks):
            part = kv[:, :, :, index * size : (index + 1) * size]
            self._kv[block, :, :, :, : part.shape[3]] = part

    def expect_lossy(self, request_id: RequestId) -> None:
        """Its KV crosses under a lossy profile: writes are near the truth, not equal to it."""
        self._lossy.add(request_id)

    def check_landed(self, request_id: RequestId, held_tokens: int, *, is_exact: bool) -> None:
        """Compare what landed with what was computed; what was held must be as it was.

        Args:
            is_exact: the receiver says that it is equal bit for bit, whatever the profile.
        """
        if is_exact:
            self._lossy.discard(request_id)
        table = self._tables[request_id]
        kv = self._gather(table, range(self._layout.num_layers), range(table.num_tokens))
        if not bool((kv[:, :, :, :held_tokens] == CANARY).all()):
            self._ledger.violated(f"{request_id}: the prefix that {self.name} held was written")
        self._compare(request_id, kv[:, :, :, held_tokens:], self._truth[request_id][:, :, :, held_tokens:], "landed")

    def free(self, request_id: RequestId) -> None:
        """Give the blocks back, as an owner does on its outcome."""
        with self._lock:
            table = self._tables.pop(request_id)
        if table.num_inside:
            self._ledger.violated(f"{request_id}: {table.num_inside} accesses to {self.name} during its outcome")
        self._kv[table.blocks] = CANARY
        self._free.extend(table.blocks)
        self._lossy.discard(request_id)

    def check_quiet(self) -> None:
        """With no request alive: every block is free once, and nothing was written into a free one."""
        if self._tables or sorted(self._free) != list(range(self._num_blocks)):
            held = ", ".join(sorted(self._tables)[:5])
            self._ledger.violated(f"{self.name} leaks {self._num_blocks - len(self._free)} blocks ({held})")
        if not bool((self._kv[list(self._free)] == CANARY).all()):
            self._ledger.violated(f"{self.name}: a free block was written")

    # --- the ports ----------------------------------------------------------------------------------------------------

    def read_kv(
        self,
        request_id: RequestId,
        layers: range,
        tokens: range,
        out: Tensor | None = None,
        heads: range | None = None,
    ) -> Tensor:
        table = self._enter(request_id, "read")
        try:
            kv = self._gather(table, layers, tokens)
            if heads is not None:
                kv = kv[:, :, heads.start : heads.stop]
            return out.copy_(kv) if out is not None else kv.contiguous()
        finally:
            self._leave(table)

    def write_kv(
        self, request_id: RequestId, layers: range, tokens: range, kv: Tensor, heads: range | None = None
    ) -> None:
        table = self._enter(request_id, "write")
        try:
            heads = heads or range(self._layout.num_kv_heads)
            truth = self._truth[request_id][layers.start : layers.stop, :, heads.start : heads.stop]
            self._compare(request_id, kv, truth[:, :, :, tokens.start : tokens.stop], "written")
            size = self._layout.block_size
            for block_idx in range(tokens.start // size, -(-tokens.stop // size)):
                start, stop = max(tokens.start, block_idx * size), min(tokens.stop, (block_idx + 1) * size)
                rows = slice(start - block_idx * size, stop - block_idx * size)
                target = self._kv[table.blocks[block_idx], layers.start : layers.stop, :, heads.start : heads.stop]
                target[:, :, :, rows] = kv[:, :, :, start - tokens.start : stop - tokens.start]
        finally:
            self._leave(table)

    def _enter(self, request_id: RequestId, verb: str) -> _Table:
        with self._lock:
            table = self._tables.get(request_id)
            if table is None:
                self._ledger.violated(f"{request_id}: a {verb} in {self.name} after its outcome")
                raise RejectedError(RejectReason.NO_BLOCKS, f"{request_id} has no blocks")
            mischief = table.mischief
            if mischief is not None:
                mischief.num_accesses += 1
                if mischief.num_accesses == mischief.fails_at:
                    self._ledger.injected(f"pool {verb} {'defect' if mischief.is_defect else 'refused'}")
                    if mischief.is_defect:
                        raise ZeroDivisionError("a defect of the pool")
                    raise RejectedError(RejectReason.NO_BLOCKS, "the pool refuses")
            table.num_inside += 1
        if mischief is not None and mischief.is_slow:
            time.sleep(SLOW_ACCESS_S)
        return table

    def _leave(self, table: _Table) -> None:
        with self._lock:
            table.num_inside -= 1

    def _gather(self, table: _Table, layers: range, tokens: range) -> Tensor:
        size = self._layout.block_size
        first, last = tokens.start // size, -(-tokens.stop // size)
        blocks = self._kv[table.blocks[first:last], layers.start : layers.stop]  # [n, L, 2, K, S, D]
        kv = blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return kv[:, :, :, tokens.start - first * size : tokens.stop - first * size]

    def _compare(self, request_id: RequestId, kv: Tensor, truth: Tensor, what: str) -> None:
        if request_id not in self._lossy:
            if not torch.equal(kv, truth):
                self._ledger.violated(f"{request_id}: what was {what} differs from what was computed")
        elif kv.numel():
            error = (kv.float() - truth.float()).square().mean() / truth.float().square().mean()
            if not bool(error < 1.0):  # also not a number; the codec's quality is not the matter here, garbage is
                self._ledger.violated(f"{request_id}: what was {what} under a lossy profile is garbage ({error:.2f})")
