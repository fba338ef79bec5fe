"""Which worker holds which prefix: chained block hash -> set of workers, under one byte cap for the whole process.

A set is an integer with one bit per worker slot, so an entry is small and a prompt is matched against all workers in
one walk along its hashes. Entries leave in least-recently-used order, deepest block of a chain first, since a block
without its parents matches nothing. A lost worker is forgotten in constant time: its slot is masked out of every
match, and `sweep` takes its bits out of the entries a bounded piece at a time before the slot is given to another
worker.

Knows nothing of epochs and sequence numbers; `router.index.kv_feed` does.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from core.ids import WorkerId
from core.kv_events import Tier
from router.index.match import PrefixMatch, Run
from router.index.slots import WorkerSlots

ENTRY_BYTES = 200
"""Measured cost of one entry: 49 for the key, 32 for the set, the rest for the ordered dictionary."""
_SLOTS_PER_WORD = 30
_WORD_BYTES = 4


class PrefixIndex:
    """The index.

    Concurrency: one thread.
    """

    def __init__(self, max_bytes: int, slots: WorkerSlots) -> None:
        self._max_bytes = max_bytes
        self._worker_slots = slots
        self._holders: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._slots: dict[WorkerId, int] = {}
        self._workers: dict[int, WorkerId] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._live_mask = 0
        self._dead_mask = 0
        self._sweeping = 0  # slots that the sweep under way takes out
        self._sweep: Iterator[bytes] = iter(())

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def num_bytes(self) -> int:
        """Estimated memory of all entries."""
        return len(self._holders) * self._entry_bytes

    @property
    def _entry_bytes(self) -> int:
        return ENTRY_BYTES + (self._num_slots // _SLOTS_PER_WORD) * _WORD_BYTES

    def store(
        self, worker_id: WorkerId, hashes: Sequence[bytes], tier: Tier = Tier.DEVICE, *, parent: bytes = b""
    ) -> None:
        """Note that `worker_id` holds these blocks of one chain, in order of depth, below `parent`."""
        bit = 1 << self._slot(worker_id)
        for block in reversed(hashes):
            self._holders[block] = (self._holders.get(block, 0) & ~self._dead_mask) | bit
            self._holders.move_to_end(block)
        self._enforce_cap()

    def predict(self, worker_id: WorkerId, hashes: Sequence[bytes], now: float, ttl_s: float) -> None:
        """Note that a prompt with these blocks is on its way to `worker_id`."""

    def expire(self, now: float) -> None:
        """Let predictions lapse that have not come true."""

    def observe(self, hashes: Sequence[bytes], now: float) -> None:
        """Note that a prompt with these blocks has arrived, once for every request: what is hot follows from it."""

    def remove(self, worker_id: WorkerId, hashes: Iterable[bytes], tier: Tier = Tier.DEVICE) -> None:
        """Note that `worker_id` evicted these blocks. Unknown ones are fine: the cap may have dropped them."""
        slot = self._slots.get(worker_id)
        if slot is None:
            return
        keep = ~(self._dead_mask | (1 << slot))
        for block in hashes:
            holders = self._holders.get(block)
            if holders is not None:
                self._put_or_drop(block, holders & keep)

    def forget(self, worker_id: WorkerId) -> None:
        """Drop all that `worker_id` holds: it cleared its cache, restarted or died. Constant time; see `sweep`."""
        slot = self._slots.pop(worker_id, None)
        if slot is None:
            return
        del self._workers[slot]
        self._live_mask &= ~(1 << slot)
        self._dead_mask |= 1 << slot

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """Return how many leading blocks of `hashes` each worker holds. Touches them."""
        runs: list[Run] = []
        alive = self._live_mask
        depth = 0
        for block in hashes:
            holders = alive & self._holders.get(block, 0)
            if holders != alive and depth:
                runs.append(Run(depth, alive, alive))
            alive = holders
            if not alive:
                break
            depth += 1
        if alive and depth:
            runs.append(Run(depth, alive, alive))
        for block in reversed(hashes[:depth]):
            self._holders.move_to_end(block)
        slots = [
            self._worker_slots.of(self._workers[bit]) if bit in self._workers else 0 for bit in range(self._num_slots)
        ]
        return PrefixMatch(runs, np.array(slots, dtype=np.int64), self._worker_slots)

    def sweep(self, max_entries: int) -> bool:
        """Clean up to `max_entries` of forgotten workers. Returns whether work is left; call it now and then."""
        if not self._sweeping:
            if not self._dead_mask:
                return False
            self._sweeping = self._dead_mask
            self._sweep = iter(list(self._holders))
        for _ in range(max_entries):
            block = next(self._sweep, None)
            if block is None:
                self._finish_sweep()
                return bool(self._dead_mask)
            holders = self._holders.get(block)
            if holders is not None and holders & self._sweeping:
                self._put_or_drop(block, holders & ~self._sweeping)
        return True

    def check(self) -> None:
        """Assert that no slot is two things at once and that the cap holds."""
        assert not self._live_mask & self._dead_mask
        assert self._live_mask == sum(1 << slot for slot in self._workers)
        assert all(self._workers[slot] == worker for worker, slot in self._slots.items())
        assert not any((1 << slot) & (self._live_mask | self._dead_mask) for slot in self._free_slots)
        assert all(0 < holders < 1 << self._num_slots for holders in self._holders.values())
        assert self.num_bytes <= self._max_bytes

    def _slot(self, worker_id: WorkerId) -> int:
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._free_slots.pop() if self._free_slots else self._num_slots
            self._num_slots = max(self._num_slots, slot + 1)
            self._slots[worker_id] = slot
            self._workers[slot] = worker_id
            self._live_mask |= 1 << slot
        return slot

    def _put_or_drop(self, block: bytes, holders: int) -> None:
        if holders:
            self._holders[block] = holders
        else:
            del self._holders[block]

    def _enforce_cap(self) -> None:
        max_entries = self._max_bytes // self._entry_bytes
        while len(self._holders) > max_entries:
            self._holders.popitem(last=False)

    def _finish_sweep(self) -> None:
        swept, self._sweeping = self._sweeping, 0
        self._dead_mask &= ~swept
        while swept:
            slot = swept.bit_length() - 1
            self._free_slots.append(slot)
            swept ^= 1 << slot
