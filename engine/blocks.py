"""Who owns each block of the KV pool. Knows neither tokens nor tensors.

A block has exactly one owner at any time:

1. `FREE`: the free list.
2. `REQUEST`: one request that computes into it, alone.
3. `LEASE`: one request in a hand-off: computed and being sent, or reserved and being received.
4. `CACHE`: the prefix cache, which lends it to requests and leases under reference counts (`engine.prefix_cache`).
5. `QUARANTINE`: the request is gone, but another thread is still copying from or to it.

Only the engine thread calls this.
"""

from collections.abc import Sequence
from enum import IntEnum


class Owner(IntEnum):
    FREE = 0
    REQUEST = 1
    LEASE = 2
    CACHE = 3
    QUARANTINE = 4


class BlockManager:
    """The free list and the owner of every block. A wrong owner is our bug, hence the asserts."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._owners = bytearray(num_blocks)
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: a block used lately is warm in the CPU's caches

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owner(self, block_id: int) -> Owner:
        return Owner(self._owners[block_id])

    def allocate(self, count: int, owner: Owner) -> list[int]:
        """Take `count` blocks off the free list, which must have them."""
        assert owner is not Owner.FREE
        assert 0 <= count <= len(self._free), (count, len(self._free))
        if count == 0:
            return []
        taken = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for block_id in taken:
            assert self._owners[block_id] == Owner.FREE, (block_id, self.owner(block_id))
            self._owners[block_id] = owner
        return taken

    def transfer(self, block_ids: Sequence[int], before: Owner, after: Owner) -> None:
        """Hand blocks from one owner to another; neither is the free list."""
        assert Owner.FREE not in (before, after)
        for block_id in block_ids:
            assert self._owners[block_id] == before, (block_id, self.owner(block_id), before)
            self._owners[block_id] = after

    def free(self, block_ids: Sequence[int], owner: Owner) -> None:
        """Give blocks of `owner` back to the free list."""
        for block_id in block_ids:
            assert self._owners[block_id] == owner != Owner.FREE, (block_id, self.owner(block_id), owner)
            self._owners[block_id] = Owner.FREE
        self._free.extend(block_ids)

    def count(self, owner: Owner) -> int:
        return self._owners.count(owner)

    def check(self) -> None:
        """Assert that the free list and the owners agree."""
        assert len(set(self._free)) == len(self._free), "a block is twice in the free list"
        assert all(self._owners[block_id] == Owner.FREE for block_id in self._free)
        assert self.count(Owner.FREE) == len(self._free), "a block without owner is not in the free list"
