"""The KV blocks of one simulated worker: leased to requests, or cached by prefix and evicted least recently used first.

Accounts only, no bytes. A block has one owner: free, private to a lease, or the cache's; cached blocks that leases
use are pinned and cannot be evicted. Within a chain later blocks are always evicted before earlier ones."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class KvLease:
    """What one request holds. `pinned`: leading blocks of its prompt in the cache; `num_private`: others."""

    hashes: tuple[bytes, ...]
    num_pinned: int
    num_private: int


class KvPool:
    """Blocks of one worker.

    Args:
        on_stored: told of (block before the first, blocks) that the cache gained.
        on_removed: told of blocks that it lost.
    """

    def __init__(
        self,
        total_blocks: int,
        *,
        on_stored: Callable[[bytes, tuple[bytes, ...]], None],
        on_removed: Callable[[tuple[bytes, ...]], None],
    ) -> None:
        self.total_blocks = total_blocks
        self._on_stored = on_stored
        self._on_removed = on_removed
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # cached and not pinned, least recently used first
        self._pins: dict[bytes, int] = {}
        self._num_private = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that a new request could take, evictable cache included."""
        return self.total_blocks - self._num_private - len(self._pins)

    @property
    def cached_blocks(self) -> int:
        return len(self._idle) + len(self._pins)

    def held_blocks(self, hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prompt are cached."""
        for depth, block in enumerate(hashes):
            if block not in self._pins and block not in self._idle:
                return depth
        return len(hashes)

    def lease(self, hashes: tuple[bytes, ...], num_blocks: int) -> KvLease | None:
        """Take `num_blocks` for a request, of which its cached prefix is a part; None without room, nothing changed."""
        held = min(self.held_blocks(hashes), num_blocks)
        newly_pinned = sum(block in self._idle for block in hashes[:held])
        if num_blocks - held + newly_pinned > self.free_blocks:
            return None
        for block in hashes[:held]:
            self._idle.pop(block, None)
            self._pins[block] = self._pins.get(block, 0) + 1
        lease = KvLease(hashes, held, num_blocks - held)
        self._num_private += lease.num_private
        self._evict()
        return lease

    def grow(self, lease: KvLease, num_blocks: int) -> bool:
        """Give a lease more private blocks. Returns False, changing nothing, without room."""
        if num_blocks > self.free_blocks:
            return False
        lease.num_private += num_blocks
        self._num_private += num_blocks
        self._evict()
        return True

    def match_again(self, lease: KvLease) -> int:
        """Use what the cache gained since the lease was taken; returns how many leading blocks it holds now."""
        while lease.num_private > 0 and lease.num_pinned < len(lease.hashes):
            block = lease.hashes[lease.num_pinned]
            if block not in self._pins and block not in self._idle:
                break
            self._pin_next(lease)
        return lease.num_pinned

    def commit(self, lease: KvLease) -> None:
        """The prompt's full blocks are computed: the cache owns them now, pinned by the lease."""
        fresh: list[bytes] = []
        parent = b""
        while lease.num_private > 0 and lease.num_pinned < len(lease.hashes):
            block = lease.hashes[lease.num_pinned]
            if block not in self._pins and block not in self._idle:
                if not fresh and lease.num_pinned:
                    parent = lease.hashes[lease.num_pinned - 1]
                fresh.append(block)
            self._pin_next(lease)  # if a sibling was first, this copy is dropped
        if fresh:
            self._on_stored(parent, tuple(fresh))
        self._evict()

    def release(self, lease: KvLease) -> None:
        """The request is over: private blocks are free, pinned ones evictable, its first block last."""
        for block in reversed(lease.hashes[: lease.num_pinned]):
            if self._pins[block] > 1:
                self._pins[block] -= 1
            else:
                del self._pins[block]
                self._idle[block] = None
        self._num_private -= lease.num_private
        lease.num_pinned = lease.num_private = 0

    def _pin_next(self, lease: KvLease) -> None:
        block = lease.hashes[lease.num_pinned]
        self._idle.pop(block, None)
        self._pins[block] = self._pins.get(block, 0) + 1
        lease.num_pinned += 1
        lease.num_private -= 1
        self._num_private -= 1

    def check(self) -> None:
        """Assert that no block has two owners and that none is lost."""
        assert not self._idle.keys() & self._pins.keys()
        assert 0 <= self._num_private <= self.total_blocks
        assert self._num_private + len(self._pins) + len(self._idle) <= self.total_blocks

    def _evict(self) -> None:
        excess = self._num_private + len(self._pins) + len(self._idle) - self.total_blocks
        if excess > 0:
            removed = tuple(self._idle.popitem(last=False)[0] for _ in range(excess))
            self._on_removed(removed)
