"""Sets of workers that hold a block: each different set is kept once, blocks name it by a small integer.

Chains are held whole, so a table of a million blocks has a few hundred sets, and a set may be as wide as the fleet
without making blocks larger. A set is bitmasks by index bit: on the device, on the host, and coming (a prompt that is
on its way there will leave it), by the tick at which that promise lapses; a bit is under one tick at most, and not
under any once the block is on the device.

Life of a set: made by a rewriting (`SetEdit`), counted by the compiled functions as nodes take it and leave it,
listed there as dying when none is left, and dropped by `reclaim` unless a node has taken it again.
"""

import sys
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from router.index.layout import DEAD, DYING, LISTED, LOSS, NOBODY, OP, REFS, TARGET

_ENTRY_BYTES = 480  # of a set with narrow masks: tuples, dictionary entry, list cells; measured
_FIRST_CAPACITY = 64


class HolderSet(NamedTuple):
    device: int = 0
    host: int = 0
    coming: tuple[tuple[int, int], ...] = ()  # (tick, mask), ticks ascending, masks disjoint

    @property
    def ready(self) -> int:
        """Those that have the block on the device, or will."""
        mask = self.device
        for _, promised in self.coming:
            mask |= promised
        return mask

    def without(self, mask: int) -> "HolderSet":
        return HolderSet(self.device & ~mask, self.host & ~mask, _less(self.coming, mask))


class SetEdit(Protocol):
    """What one rewriting makes of a set. Pure."""

    def __call__(self, old: HolderSet) -> HolderSet: ...


class HolderSets:
    """The sets in use.

    Attributes:
        cells: int32[capacity, 6], what the compiled functions know of each set; replaced when it grows.

    Concurrency: one thread.
    """

    def __init__(self) -> None:
        self.cells = _cells(_FIRST_CAPACITY)
        self._sets: list[HolderSet | None] = [HolderSet()]
        self._reaches: list[tuple[int, int]] = [(0, 0)]
        self._ids: dict[HolderSet, int] = {HolderSet(): NOBODY}
        self._free: list[int] = []
        self._fresh: list[int] = []  # made and perhaps never taken
        self._num_bytes = 0
        self._num_ops = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, set_id: int) -> HolderSet:
        found = self._sets[set_id]
        assert found is not None, f"set {set_id} was dropped"
        return found

    def reach(self, set_id: int) -> tuple[int, int]:
        """Return the masks of those that have the block on the device, or will; and of those that have it at all."""
        return self._reaches[set_id]

    def ready_by_id(self, bit: int) -> NDArray[np.bool_]:
        """Say of each set whether the worker of `bit` has the block on the device in it, or will."""
        return np.fromiter((bool(ready & bit) for ready, _ in self._reaches), np.bool_, len(self._reaches))

    @property
    def num_bytes(self) -> int:
        """Memory of all sets."""
        return self._num_bytes + self.cells.nbytes

    def new_op(self) -> int:
        """Return the number of a new rewriting, which may use the next one, too."""
        if self._num_ops > 2**31 - 8:
            self.cells[:, OP] = 0
            self._num_ops = 0
        self._num_ops += 2
        return self._num_ops

    def note(self, old_id: int, op: int, edit: SetEdit, *, bit: int = 0) -> None:
        """Say what a set becomes under `op`; also whether the worker of `bit` has no copy in any tier then."""
        new = edit(self[old_id])
        new_id = self._id(new)
        cells = self.cells
        cells[old_id, LOSS] = not (new.device | new.host) & bit
        cells[old_id, TARGET] = new_id
        cells[old_id, OP] = op

    def reclaim(self, head: NDArray[np.int64]) -> None:
        """Drop the sets that no node has. Call it between rewritings only."""
        if not head[DYING] and not self._fresh:
            return
        cells = self.cells
        dying = cells[: head[DYING], DEAD].tolist()
        head[DYING] = 0
        for set_id in dying:
            cells[set_id, LISTED] = 0
        for set_id in (*dying, *self._fresh):
            held = self._sets[set_id]
            if held is not None and set_id != NOBODY and cells[set_id, REFS] == 0:
                del self._ids[held]
                self._sets[set_id] = None
                self._reaches[set_id] = (0, 0)
                self._free.append(set_id)
                self._num_bytes -= _size(held)
        self._fresh.clear()

    def check(self) -> None:
        """Assert that every set is kept once, is in use, and is counted."""
        assert all(self._sets[set_id] == held for held, set_id in self._ids.items())
        assert len(self._ids) + len(self._free) == len(self._sets)
        assert not self._fresh
        assert all(self.cells[set_id, REFS] > 0 for set_id in self._ids.values() if set_id != NOBODY)
        assert self._num_bytes == sum(_size(held) for held in self._ids if self._ids[held] != NOBODY)
        for held in self._ids:
            assert not held.device & (held.ready ^ held.device)
            assert sum(mask.bit_count() for _, mask in held.coming) == (held.ready ^ held.device).bit_count()

    def check_closed(self, lower_id: int, upper_id: int, live: int) -> None:
        """Assert that whoever holds the block of `lower_id` holds the one above it, in a tier as good or better."""
        lower, upper = self[lower_id], self[upper_id]
        assert not lower.device & ~upper.device & live
        assert not lower.ready & ~upper.ready & live
        assert not (lower.device | lower.host) & ~(upper.device | upper.host) & live

    def _id(self, wanted: HolderSet) -> int:
        set_id = self._ids.get(wanted)
        if set_id is not None:
            return set_id
        if self._free:
            set_id = self._free.pop()
        else:
            set_id = len(self._sets)
            self._sets.append(None)
            self._reaches.append((0, 0))
            if set_id == len(self.cells):
                grown = _cells(2 * set_id)
                grown[:set_id] = self.cells
                self.cells = grown
        self._sets[set_id] = wanted
        ready = wanted.ready
        self._reaches[set_id] = (ready, ready | wanted.host)
        self._ids[wanted] = set_id
        cells = self.cells
        cells[set_id, REFS] = cells[set_id, LISTED] = cells[set_id, OP] = 0  # DEAD is a list of its own
        self._num_bytes += _size(wanted)
        self._fresh.append(set_id)
        return set_id


def stored_on_device(bit: int) -> SetEdit:
    def edit(old: HolderSet) -> HolderSet:
        if not bit & ~old.device:
            return old
        return HolderSet(old.device | bit, old.host, _less(old.coming, bit))

    return edit


def stored_on_host(bit: int) -> SetEdit:
    return lambda old: old._replace(host=old.host | bit)


def held_somewhere(bit: int) -> SetEdit:
    """A worker that stores a block on its host has those above it somewhere."""
    return lambda old: old if (old.device | old.host) & bit else old._replace(host=old.host | bit)


def promised(bit: int, tick: int) -> SetEdit:
    """The block will be on the device unless the promise lapses at `tick`. A later promise stands."""

    def edit(old: HolderSet) -> HolderSet:
        if old.device & bit:
            return old
        mask = bit
        sooner, later = [], []
        for entry in old.coming:
            known, others = entry
            if known == tick:
                if others & bit:
                    return old
                mask |= others
            elif known > tick:
                if others & bit:
                    return old
                later.append(entry)
            elif others & bit == 0:
                sooner.append(entry)
            elif others != bit:
                sooner.append((known, others ^ bit))
        return HolderSet(old.device, old.host, (*sooner, (tick, mask), *later))

    return edit


def joined(below: HolderSet, present: int) -> SetEdit:
    """What holders of a block that was a root hold above it: all that is above it, in the tier of that block."""

    def edit(old: HolderSet) -> HolderSet:
        new = stored_on_device(below.device & present & ~old.device)(old)
        for tick, mask in below.coming:
            bits = mask & present
            while bits:
                bit = bits & -bits
                new = promised(bit, tick)(new)
                bits ^= bit
        return new._replace(host=new.host | (below.host & present & ~new.device))

    return edit


def moved(before: int, bit: int) -> SetEdit:
    """What was promised to the one is promised to the other, who holds nothing yet."""
    return lambda old: old._replace(
        coming=tuple((tick, mask ^ before | bit if mask & before else mask) for tick, mask in old.coming)
    )


def lapsed(tick: int) -> SetEdit:
    return lambda old: old._replace(coming=tuple(entry for entry in old.coming if entry[0] != tick))


def removed_from_device(bit: int) -> SetEdit:
    return lambda old: HolderSet(old.device & ~bit, old.host, _less(old.coming, bit))


def removed_from_host(bit: int) -> SetEdit:
    """Without a copy on the device nothing can come of a promise either: it counted on this one."""

    def edit(old: HolderSet) -> HolderSet:
        if not old.host & bit:
            return old
        return old._replace(host=old.host & ~bit) if old.device & bit else old.without(bit)

    return edit


def without(mask: int) -> SetEdit:
    return lambda old: old.without(mask)


def _less(coming: tuple[tuple[int, int], ...], mask: int) -> tuple[tuple[int, int], ...]:
    return tuple((tick, rest) for tick, promised in coming if (rest := promised & ~mask))


def _cells(capacity: int) -> NDArray[np.int32]:
    return np.zeros((capacity, 6), dtype=np.int32)


def _size(held: HolderSet) -> int:
    masks = 2 * sys.getsizeof(held.device) + 2 * sys.getsizeof(held.host)  # two are of the reach
    return _ENTRY_BYTES + masks + sum(sys.getsizeof(mask) + 88 for _, mask in held.coming)
