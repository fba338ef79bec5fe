"""Block ownership and the prefix cache."""

import pytest

from core.blocks import block_hashes, hash_namespace
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared
from engine import prefix_cache
from engine.blocks import BlockManager, Owner
from engine.prefix_cache import CacheEntry, PrefixCache

ROOT = hash_namespace("w")


def chain_of(tokens: str) -> tuple[bytes, ...]:
    """One block per letter."""
    return block_hashes([ord(letter) for letter in tokens], 1, ROOT)


def store(cache: PrefixCache, blocks: BlockManager, tokens: str) -> list[CacheEntry]:
    """Compute a chain and hold it, as a request would."""
    hashes = chain_of(tokens)
    held = cache.match(hashes)
    cache.acquire(held)
    for depth in range(len(held), len(hashes)):
        if not blocks.num_free:
            cache.evict(1)
        (block_id,) = blocks.allocate(1, Owner.REQUEST)
        parent = hashes[depth - 1] if depth else ROOT
        entry = cache.insert(hashes[depth], parent, depth, block_id)
        assert entry is not None
        held.append(entry)
    return held


def make(num_blocks: int = 8, max_blocks: int = 8) -> tuple[BlockManager, PrefixCache]:
    blocks = BlockManager(num_blocks)
    return blocks, PrefixCache(blocks, max_blocks=max_blocks)


def test_allocated_blocks_are_distinct_and_owned() -> None:
    blocks = BlockManager(6)
    one, two = blocks.allocate(2, Owner.REQUEST), blocks.allocate(3, Owner.LEASE)
    assert len({*one, *two}) == 5
    assert blocks.num_free == 1
    assert {blocks.owner(block_id) for block_id in two} == {Owner.LEASE}
    assert blocks.allocate(0, Owner.REQUEST) == []
    blocks.free(one, Owner.REQUEST)
    blocks.transfer(two, Owner.LEASE, Owner.QUARANTINE)
    blocks.check()
    assert (blocks.num_free, blocks.count(Owner.QUARANTINE)) == (3, 3)


def test_a_wrong_owner_is_refused() -> None:
    blocks = BlockManager(3)
    taken = blocks.allocate(1, Owner.REQUEST)
    with pytest.raises(AssertionError):
        blocks.free(taken, Owner.LEASE)
    blocks.free(taken, Owner.REQUEST)
    with pytest.raises(AssertionError):
        blocks.free(taken, Owner.REQUEST)
    with pytest.raises(AssertionError):
        blocks.transfer(taken, Owner.REQUEST, Owner.LEASE)
    with pytest.raises(AssertionError):
        blocks.allocate(4, Owner.REQUEST)
    blocks.check()


def test_match_ends_at_the_first_miss() -> None:
    blocks, cache = make()
    cache.release(store(cache, blocks, "abc"))
    for tokens, count in {"abc": 3, "abcd": 3, "abx": 2, "ab": 2, "xbc": 0, "": 0}.items():
        assert len(cache.match(chain_of(tokens))) == count
    cache.check([])


def test_the_longest_idle_chain_goes_first_and_from_its_leaf() -> None:
    blocks, cache = make()
    old, new = store(cache, blocks, "abc"), store(cache, blocks, "xyz")
    cache.release(old)
    cache.release(new)
    for left in ("ab", "a", ""):
        assert cache.evict(1) == 1
        cache.check([])
        assert len(cache.match(chain_of("abc"))) == len(left)
        assert len(cache.match(chain_of("xyz"))) == 3
    assert blocks.num_free == 5


def test_use_makes_a_chain_young_again() -> None:
    blocks, cache = make()
    cache.release(store(cache, blocks, "ab"))
    cache.release(store(cache, blocks, "xy"))
    cache.release(store(cache, blocks, "ab"))
    cache.evict(2)
    assert [len(cache.match(chain_of(tokens))) for tokens in ("ab", "xy")] == [2, 0]


def test_what_is_held_is_not_evicted() -> None:
    blocks, cache = make()
    held = store(cache, blocks, "ab")
    longer = store(cache, blocks, "abcd")
    cache.release(longer)
    assert cache.evict(10) == 2
    cache.check([held])
    assert len(cache.match(chain_of("abcd"))) == 2


def test_the_same_prefix_computed_twice_is_kept_once() -> None:
    blocks, cache = make()
    first = store(cache, blocks, "a")
    (duplicate,) = blocks.allocate(1, Owner.REQUEST)
    entry = cache.insert(chain_of("a")[0], ROOT, 0, duplicate)
    assert entry is first[0]
    assert entry.references == 2
    assert blocks.owner(duplicate) is Owner.REQUEST


def test_the_cap_evicts_idle_entries_and_refuses_when_all_are_lent() -> None:
    blocks, cache = make(num_blocks=8, max_blocks=3)
    cache.release(store(cache, blocks, "abc"))
    held = store(cache, blocks, "xyz")
    assert len(cache) == 3
    assert not cache.match(chain_of("a"))
    (block_id,) = blocks.allocate(1, Owner.REQUEST)
    assert cache.insert(chain_of("xyz!")[3], held[-1].digest, 3, block_id) is None
    assert blocks.owner(block_id) is Owner.REQUEST
    cache.check([held])


def test_events_replay_to_the_snapshot() -> None:
    blocks, cache = make()
    cache.release(store(cache, blocks, "abc"))
    cache.release(store(cache, blocks, "abx"))
    assert cache.take_events() == [
        BlocksStored(ROOT, chain_of("abc")),
        BlocksStored(chain_of("ab")[-1], chain_of("abx")[2:]),
    ]
    cache.evict(1)
    assert cache.take_events() == [BlocksRemoved((chain_of("abc")[2],))]
    cache.release(store(cache, blocks, "aqr"))
    chains = cache.snapshot()
    assert chains[0] == BlocksStored(ROOT, chain_of("a"))
    assert {(chain.parent, chain.hashes) for chain in chains[1:]} == {
        (chain_of("a")[0], chain_of("abx")[1:]),
        (chain_of("a")[0], chain_of("aqr")[1:]),
    }


def test_events_that_nobody_takes_become_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "_MAX_PENDING_EVENTS", 3)
    blocks, cache = make()
    for tokens in ("a", "b", "c", "d"):
        cache.release(store(cache, blocks, tokens))
    events = cache.take_events()
    assert events[0] == CacheCleared()
    assert {event.hashes for event in events[1:] if isinstance(event, BlocksStored)} == {
        chain_of(tokens) for tokens in "abcd"
    }
    cache.release(store(cache, blocks, "e"))
    assert cache.take_events() == [BlocksStored(ROOT, chain_of("e"))]


def test_a_long_chain_becomes_one_event_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(parent: bytes, hashes: tuple[bytes, ...]) -> BlocksStored:
        built.append(len(hashes))
        return BlocksStored(parent, hashes)

    blocks, cache = make(60, 60)
    monkeypatch.setattr(prefix_cache, "BlocksStored", build)
    tokens = "".join(chr(0x100 + at) for at in range(50))
    cache.release(store(cache, blocks, tokens))
    assert cache.take_events() == [BlocksStored(ROOT, chain_of(tokens))]
    assert built == [50]


def test_events_keep_their_order_around_chains_that_grow() -> None:
    blocks, cache = make()
    cache.release(store(cache, blocks, "ab"))
    cache.release(store(cache, blocks, "xy"))
    cache.release(store(cache, blocks, "abc"))
    assert cache.take_events() == [
        BlocksStored(ROOT, chain_of("ab")),
        BlocksStored(ROOT, chain_of("xy")),
        BlocksStored(chain_of("ab")[1], chain_of("abc")[2:]),
    ]
    cache.release(store(cache, blocks, "abcd"))
    cache.evict(1)
    cache.release(store(cache, blocks, "abcde"))
    abcde = chain_of("abcde")
    assert cache.take_events() == [
        BlocksStored(abcde[2], abcde[3:4]),
        BlocksRemoved((chain_of("xy")[1],)),
        BlocksStored(abcde[3], abcde[4:]),
    ]
