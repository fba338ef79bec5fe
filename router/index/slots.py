"""Small integers for workers, so that facts about them can live in arrays and bitsets.

One `WorkerSlots` is shared by the prefix index and the table of workers. A worker keeps its slot from the first time
somebody asks for it until it is released: whoever drops the last row about a worker that left (the table) does that.
The index may still have bits of the worker then; it keeps those apart by bits of its own, so a released slot can be
given to another worker at once. The lowest free slot is given first, which keeps the arrays short.
"""

import heapq

from core.ids import WorkerId


class WorkerSlots:
    """The slots of one gateway. Concurrency: one thread."""

    def __init__(self) -> None:
        self._slots: dict[WorkerId, int] = {}
        self._workers: list[WorkerId | None] = []
        self._free: list[int] = []
        self._version = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def capacity(self) -> int:
        """One more than the highest slot ever given: the length that arrays by slot need."""
        return len(self._workers)

    @property
    def version(self) -> int:
        """Grows when a slot is given or released."""
        return self._version

    def of(self, worker_id: WorkerId) -> int:
        """Return the worker's slot, giving it one if it has none."""
        slot = self._slots.get(worker_id)
        if slot is not None:
            return slot
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = len(self._workers)
            self._workers.append(None)
        self._slots[worker_id] = slot
        self._workers[slot] = worker_id
        self._version += 1
        return slot

    def find(self, worker_id: WorkerId) -> int | None:
        return self._slots.get(worker_id)

    def worker(self, slot: int) -> WorkerId | None:
        """Return whose slot it is; None when it is nobody's."""
        return self._workers[slot] if 0 <= slot < len(self._workers) else None

    def release(self, worker_id: WorkerId) -> None:
        """The worker left: its slot may be given to another. Idempotent."""
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            self._workers[slot] = None
            heapq.heappush(self._free, slot)
            self._version += 1

    def check(self) -> None:
        """Assert that slots and workers agree and that no slot is lost."""
        assert all(self._workers[slot] == worker_id for worker_id, slot in self._slots.items())
        assert sorted([*self._free, *self._slots.values()]) == list(range(len(self._workers)))
