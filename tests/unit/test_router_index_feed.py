"""Feeds keep one worker's part of the prefix index in step with its events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import block_hashes
from core.errors import ProtocolError
from core.ids import Epoch, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent, KvEventBatch, Tier
from router.index.kv_feed import FeedResult, KvFeed
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots

A = WorkerId("a")
ROOT = b"r" * 16


def chain(*tokens: int) -> tuple[bytes, ...]:
    """Hashes of a prompt of one-token blocks."""
    return block_hashes(tokens, 1, ROOT)


def big() -> PrefixIndex:
    return PrefixIndex(2**20, WorkerSlots())


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


@pytest.mark.parametrize("sequence", [0, 2])
def test_a_snapshot_says_nothing_of_prompts_on_their_way(sequence: int) -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    if sequence:
        feed.apply(batch(1, stored(1), stored(5)))
    feed.is_lost = True
    index.predict(A, chain(1, 2, 3), now=0.0, ttl_s=10.0)
    index.predict(A, chain(5, 6), now=0.0, ttl_s=10.0)
    assert feed.resynchronise(Epoch(1), sequence, [stored(1)] if sequence else [])
    assert index.match(chain(1, 2, 3)).holders() == {A: 3}
    assert index.match(chain(5, 6)).holders() == ({} if sequence else {A: 2}), "below a block that is gone"
    index.check()
    index.expire(20.0)
    assert index.match(chain(1, 2, 3)).holders() == ({A: 1} if sequence else {})


def test_a_snapshot_of_a_newer_epoch_ends_what_was_on_its_way_to_the_older() -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    index.predict(A, chain(1, 2), now=0.0, ttl_s=10.0)
    assert feed.resynchronise(Epoch(2), 1, [stored(1)])
    assert index.match(chain(1, 2)).holders() == {A: 1}


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


def test_tiers_and_parents_of_events_reach_the_index() -> None:
    index = big()
    feed = KvFeed(A, Epoch(1), index)
    whole = chain(1, 2, 3)
    feed.apply(batch(1, BlocksStored(ROOT, whole[:2]), BlocksStored(whole[1], whole[2:], Tier.HOST)))
    assert index.match(whole).holders() == {A: 2}
    assert index.match(whole).holders(Tier.HOST) == {A: 3}
    feed.apply(batch(2, BlocksRemoved(whole[2:], Tier.HOST)))
    assert index.match(whole).holders(Tier.HOST) == {A: 2}
    assert feed.resynchronise(Epoch(1), 9, [BlocksStored(ROOT, whole, Tier.HOST)])
    assert index.match(whole).holders() == {}
    assert index.match(whole).holders(Tier.HOST) == {A: 3}


def test_an_event_with_a_malformed_hash_is_an_error_and_not_a_guess() -> None:
    index = big()
    with pytest.raises(ProtocolError, match="16 bytes"):
        KvFeed(A, Epoch(1), index).apply(batch(1, BlocksStored(ROOT, (b"short",))))
    assert len(index) == 0
