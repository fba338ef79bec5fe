"""The prefix index against a naive model, under its byte cap; and the feeds that keep it in step."""

import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.blocks import block_hashes
from core.ids import Epoch, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent, KvEventBatch
from router.index.kv_feed import FeedResult, KvFeed
from router.index.prefix_index import ENTRY_BYTES, PrefixIndex
from router.index.slots import WorkerSlots

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
ROOT = b"r" * 16


def chain(*tokens: int) -> tuple[bytes, ...]:
    """Hashes of a prompt of one-token blocks."""
    return block_hashes(tokens, 1, ROOT)


def big() -> PrefixIndex:
    return PrefixIndex(2**20, WorkerSlots())


def test_matches_the_leading_blocks_of_each_worker() -> None:
    index = big()
    index.store(A, chain(1, 2, 3, 4))
    index.store(B, chain(1, 2))
    index.store(C, chain(9))
    assert index.match(chain(1, 2, 3, 5)).holders() == {A: 3, B: 2}
    assert index.match(chain(9, 1)).holders() == {C: 1}
    assert index.match(chain(7)).holders() == {}
    assert index.match(()).holders() == {}


def test_a_hole_in_the_chain_ends_the_match() -> None:
    index = big()
    hashes = chain(1, 2, 3, 4)
    index.store(A, hashes)
    index.remove(A, [hashes[1]])
    assert index.match(hashes).holders() == {A: 1}
    index.remove(A, [hashes[0], b"unknown" + b"-" * 9])
    assert index.match(hashes).holders() == {}


def test_a_forgotten_worker_matches_nothing_at_once_and_its_slot_is_reused_after_the_sweep() -> None:
    index = big()
    hashes = chain(*range(100))
    index.store(A, hashes)
    index.store(B, hashes[:50])
    index.forget(A)
    assert index.match(hashes).holders() == {B: 50}
    assert len(index) == 100, "bounded time: the entries are still there"
    assert index.sweep(60)
    index.store(C, chain(5, 6))  # while the sweep is under way
    while index.sweep(60):
        index.check()
    assert len(index) == 52
    index.store(A, hashes[:3])
    assert index.match(hashes).holders() == {A: 3, B: 50}
    index.check()


def test_the_cap_drops_what_was_not_used_and_children_before_parents() -> None:
    index = PrefixIndex(10 * ENTRY_BYTES, WorkerSlots())
    old, hot = chain(1, 2, 3, 4, 5), chain(7, 8, 9)
    index.store(A, old)
    index.store(A, hot)
    index.match(old)
    index.store(A, chain(20, 21, 22, 23))
    assert index.match(old).holders() == {A: 5}, "used lately"
    assert index.match(hot).holders() == {A: 1}, "its deepest blocks went first"
    assert index.num_bytes <= 10 * ENTRY_BYTES
    index.check()


def test_the_cap_holds_for_real_memory_while_prefixes_churn() -> None:
    cap = 2 * 2**20
    index = PrefixIndex(cap, WorkerSlots())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(400):
            index.store(WorkerId(f"w{number % 50}"), chain(number, *range(99)))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    index.check()
    assert len(index) < 400 * 100
    assert grown < 1.25 * cap


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
workers = st.sampled_from([A, B, C])


class IndexMachine(RuleBasedStateMachine):
    """An index that is never full equals a set of hashes per worker."""

    def __init__(self) -> None:
        super().__init__()
        self.index = big()
        self.model: dict[WorkerId, set[bytes]] = {}

    @rule(worker=workers, tokens=prompts)
    def store(self, worker: WorkerId, tokens: Sequence[int]) -> None:
        self.index.store(worker, chain(*tokens))
        self.model.setdefault(worker, set()).update(chain(*tokens))

    @rule(worker=workers, tokens=prompts, depth=st.integers(0, 5))
    def remove(self, worker: WorkerId, tokens: Sequence[int], depth: int) -> None:
        hashes = chain(*tokens)[depth:]
        self.index.remove(worker, hashes)
        self.model.get(worker, set()).difference_update(hashes)

    @rule(worker=workers)
    def forget(self, worker: WorkerId) -> None:
        self.index.forget(worker)
        self.model.pop(worker, None)

    @rule(budget=st.integers(1, 20))
    def sweep(self, budget: int) -> None:
        self.index.sweep(budget)

    @rule(tokens=prompts)
    def match(self, tokens: Sequence[int]) -> None:
        expected = {}
        for worker, held in self.model.items():
            depth = 0
            for block in chain(*tokens):
                if block not in held:
                    break
                depth += 1
            if depth:
                expected[worker] = depth
        assert self.index.match(chain(*tokens)).holders() == expected

    @precondition(lambda self: not self.model)
    @rule()
    def sweep_leaves_nothing(self) -> None:
        while self.index.sweep(100):
            pass
        assert len(self.index) == 0

    @invariant()
    def is_consistent(self) -> None:
        self.index.check()


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIndexMachine = IndexMachine.TestCase


def batch(sequence: int, *events: KvEvent, epoch: int = 1) -> KvEventBatch:
    return KvEventBatch(A, Epoch(epoch), sequence, events)


def stored(*tokens: int) -> BlocksStored:
    return BlocksStored(ROOT, chain(*tokens))


def test_a_feed_applies_batches_in_sequence_and_skips_repeats() -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    assert feed.apply(batch(1, stored(1, 2))) is FeedResult.APPLIED
    assert feed.apply(batch(2, BlocksRemoved(chain(1, 2)[1:]))) is FeedResult.APPLIED
    assert feed.apply(batch(1, stored(5))) is FeedResult.SKIPPED
    assert index.match(chain(1, 2)).holders() == {A: 1}
    assert feed.apply(batch(3, CacheCleared())) is FeedResult.APPLIED
    assert index.match(chain(1, 2)).holders() == {}


def test_a_gap_loses_the_feed_until_a_snapshot() -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    feed.apply(batch(1, stored(1)))
    assert feed.apply(batch(3, stored(3))) is FeedResult.GAP
    assert feed.apply(batch(2, stored(2))) is FeedResult.GAP, "lost: only a snapshot helps"
    assert feed.resynchronise(Epoch(1), 3, [stored(2), stored(3)])
    assert feed.apply(batch(3, stored(3))) is FeedResult.SKIPPED
    assert feed.apply(batch(4, stored(4))) is FeedResult.APPLIED
    assert [bool(index.match(chain(token)).holders()) for token in (1, 2, 3, 4)] == [False, True, True, True]


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_newer_epoch_begins_with_an_empty_cache(sequence: int) -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    feed.apply(batch(1, stored(1)))
    result = feed.apply(batch(sequence, stored(2), epoch=2))
    assert result is (FeedResult.APPLIED if sequence == 1 else FeedResult.GAP)
    assert index.match(chain(1)).holders() == {}
    assert feed.apply(batch(9, stored(3), epoch=1)) is FeedResult.SKIPPED


def test_a_snapshot_older_than_what_is_known_is_refused() -> None:
    index = big()
    feed = KvFeed(A, Epoch(2), index)
    feed.apply(batch(1, stored(1), epoch=2))
    assert not feed.resynchronise(Epoch(1), 100, [])
    assert not feed.resynchronise(Epoch(2), 0, [])
    assert index.match(chain(1)).holders() == {A: 1}


@given(st.lists(st.integers(1, 12), max_size=40))
def test_whatever_is_lost_or_repeated_the_feed_ends_in_step(arrivals: list[int]) -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    for sequence in arrivals:
        if feed.apply(batch(sequence, stored(sequence))) is FeedResult.GAP:
            newest = max(sequence, feed.sequence)
            feed.resynchronise(Epoch(1), newest, [stored(number) for number in range(1, newest + 1)])
    for sequence in range(1, 13):
        assert (index.match(chain(sequence)).holders() == {A: 1}) == (sequence <= feed.sequence)
