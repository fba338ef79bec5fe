"""The simulated KV accounts: one owner per block, LRU that keeps prefixes whole."""

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from simulator.kv_pool import KvLease, KvPool


def _chain(family: int, length: int) -> tuple[bytes, ...]:
    """Chains of one family share their first three blocks with family 0."""
    return tuple(f"{0 if depth < 3 else family}/{depth}".encode() for depth in range(length))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cached: set[bytes] = set()  # as told by events
        self.pool = KvPool(24, on_stored=self.stored, on_removed=self.removed)
        self.leases: list[KvLease] = []

    def stored(self, parent: bytes, blocks: tuple[bytes, ...]) -> None:
        depths = [int(block.decode().split("/")[1]) for block in blocks]
        assert depths == list(range(depths[0], depths[0] + len(depths)))
        assert (parent in self.cached) if depths[0] else parent == b""
        assert not self.cached & set(blocks)
        self.cached |= set(blocks)

    def removed(self, blocks: tuple[bytes, ...]) -> None:
        assert self.cached >= set(blocks)
        self.cached -= set(blocks)

    @rule(family=st.integers(0, 4), length=st.integers(0, 9), extra=st.integers(0, 4))
    def lease(self, family: int, length: int, extra: int) -> None:
        hashes = _chain(family, length)
        held, free = self.pool.held_blocks(hashes), self.pool.free_blocks
        lease = self.pool.lease(hashes, length + extra)
        if lease is None:
            assert self.pool.free_blocks == free
            assert length + extra - held + held > free
        else:
            assert (lease.num_pinned, lease.num_private) == (held, length + extra - held)
            self.leases.append(lease)

    @rule(number=st.integers(0, 100), commits=st.booleans())
    def end(self, number: int, commits: bool) -> None:
        if self.leases:
            lease = self.leases.pop(number % len(self.leases))
            if commits:
                self.pool.match_again(lease)
                self.pool.commit(lease)
                assert self.pool.held_blocks(lease.hashes) == len(lease.hashes)
            self.pool.release(lease)

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check()
        assert len(self.cached) == self.pool.cached_blocks
        for family in range(5):
            chain = _chain(family, 9)
            held = [block in self.cached for block in chain[: self.pool.held_blocks(chain)]]
            assert all(held)

    @invariant()
    def what_is_cached_has_its_prefix(self) -> None:
        for block in self.cached:
            family, depth = block.decode().split("/")
            assert self.pool.held_blocks(_chain(int(family), int(depth) + 1)) == int(depth) + 1


TestPool = PoolMachine.TestCase


def test_the_least_recently_used_leaves_first() -> None:
    removed: list[bytes] = []
    pool = KvPool(6, on_stored=lambda parent, blocks: None, on_removed=removed.extend)
    for name in ("a", "b", "a", "c"):
        hashes = tuple(f"{name}{depth}".encode() for depth in range(2))
        lease = pool.lease(hashes, 2)
        assert lease is not None
        pool.commit(lease)
        pool.release(lease)
    lease = pool.lease((), 1)
    assert lease is not None
    assert removed == [b"b1"]


def test_hit_ratio_of_a_random_stream_equals_a_naive_lru() -> None:
    rng = random.Random(4)
    pool = KvPool(40, on_stored=lambda parent, blocks: None, on_removed=lambda blocks: None)
    naive: list[bytes] = []
    hits = naive_hits = 0
    for _ in range(3000):
        hashes = _chain(rng.randrange(12), rng.randrange(1, 10))
        hits += pool.held_blocks(hashes)
        lease = pool.lease(hashes, len(hashes))
        assert lease is not None
        pool.commit(lease)
        pool.release(lease)
        depth = next((i for i, block in enumerate(hashes) if block not in naive), len(hashes))
        naive_hits += depth
        for block in reversed(hashes):
            if block in naive:
                naive.remove(block)
            naive.append(block)
        del naive[: max(0, len(naive) - 40)]
    assert hits == naive_hits > 0
