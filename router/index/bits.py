"""The index's own bit for each worker, and those of forgotten workers until the sweep has taken them out.

Bits and not slots are in the sets of holders: a worker that restarts keeps its slot and gets another bit at once,
while its old one is still in entries that nobody has looked at since.
"""

import numpy as np
from numpy.typing import NDArray

from core.ids import WorkerId
from router.index.slots import WorkerSlots


class IndexBits:
    """Bits by worker.

    Attributes:
        live: mask of the workers that are known and have a slot.
        slot_of_bit: int64, by bit; cells of bits that are not live mean nothing.
    """

    def __init__(self, slots: WorkerSlots) -> None:
        self.slots = slots
        self._bits: dict[WorkerId, int] = {}
        self._free: list[int] = []
        self._capacity = 0
        self._retired = 0
        self._sweeping = 0
        self._live = 0
        self._slot_of_bit = np.zeros(0, dtype=np.int64)
        self._seen_version = -1  # of the slots; -1: bits have changed

    @property
    def live(self) -> int:
        self._refresh()
        return self._live

    @property
    def slot_of_bit(self) -> NDArray[np.int64]:
        self._refresh()
        return self._slot_of_bit

    @property
    def named(self) -> int:
        """Mask of the bits that are some worker's."""
        return sum(1 << bit for bit in self._bits.values())

    @property
    def known(self) -> int:
        """Mask of the bits that entries may have."""
        return self.named | self._retired | self._sweeping

    @property
    def has_retired(self) -> bool:
        return bool(self._retired | self._sweeping)

    def of(self, worker_id: WorkerId) -> int:
        """Return the worker's bit, giving it one if it has none."""
        bit = self._bits.get(worker_id)
        if bit is None:
            self.slots.of(worker_id)
            if self._free:
                bit = self._free.pop()
            else:
                bit = self._capacity
                self._capacity += 1
            self._bits[worker_id] = bit
            self._seen_version = -1
        return bit

    def find(self, worker_id: WorkerId) -> int | None:
        return self._bits.get(worker_id)

    def retire(self, worker_id: WorkerId) -> None:
        """The bit means nobody from now on; it is free again when a sweep that began later has ended."""
        bit = self._bits.pop(worker_id, None)
        if bit is not None:
            self._retired |= 1 << bit
            self._seen_version = -1

    def begin_sweep(self) -> int:
        """Return the mask that the sweep under way takes out, beginning one if there is none."""
        if not self._sweeping:
            self._sweeping, self._retired = self._retired, 0
        return self._sweeping

    def end_sweep(self) -> None:
        swept, self._sweeping = self._sweeping, 0
        while swept:
            bit = swept.bit_length() - 1
            self._free.append(bit)
            swept ^= 1 << bit

    def check(self) -> None:
        """Assert that no bit is two things at once and that none is lost."""
        named = [*self._bits.values(), *self._free]
        for mask in (self._retired, self._sweeping):
            named += [bit for bit in range(self._capacity) if mask >> bit & 1]
        assert sorted(named) == list(range(self._capacity))

    def _refresh(self) -> None:
        if self._seen_version == self.slots.version:
            return
        self._live = 0
        self._slot_of_bit = np.zeros(self._capacity, dtype=np.int64)  # a new one: matches keep theirs
        for worker_id, bit in self._bits.items():
            slot = self.slots.find(worker_id)
            if slot is not None:
                self._live |= 1 << bit
                self._slot_of_bit[bit] = slot
        self._seen_version = self.slots.version
