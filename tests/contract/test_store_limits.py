"""Token buckets and slots: one suite for both implementations of the store port."""

import asyncio

import pytest

from core.clock import ManualClock
from core.errors import StoreUnavailable
from core.store import Store
from core.store_memory import MemoryStore
from core.token_bucket import BucketTake
from tests.contract.conftest import Pass

SLOW = 0.001  # tokens per second: nothing to speak of is gained during a test


def take(amount: float, *, key: str = "b", capacity: float = 10.0, refill_per_s: float = SLOW) -> BucketTake:
    return BucketTake(key, amount, capacity, refill_per_s)


async def test_a_bucket_gives_what_it_holds_and_says_how_long_to_wait(store: Store) -> None:
    assert await store.take_tokens([take(7.0)]) == (None, 0.0)
    refused = await store.take_tokens([take(4.0)])
    assert refused.refused == 0
    assert refused.retry_after_s == pytest.approx(1.0 / SLOW, rel=0.01)
    assert (await store.take_tokens([take(3.0)])).refused is None, "the refusal took nothing"
    assert (await store.take_tokens([take(1.0)])).refused == 0


async def test_a_bucket_fills_up_and_not_over(store: Store, let_pass: Pass) -> None:
    fast = take(10.0, refill_per_s=50.0)
    assert (await store.take_tokens([fast])).refused is None
    assert (await store.take_tokens([fast])).refused == 0
    await let_pass(0.3)
    assert (await store.take_tokens([fast])).refused is None
    assert (await store.take_tokens([take(9.0)])).refused == 0


async def test_all_buckets_or_none(store: Store) -> None:
    small, large = take(3.0, key="small", capacity=5.0), take(8.0, key="large", capacity=10.0)
    assert (await store.take_tokens([small, large])).refused is None
    refused = await store.take_tokens([take(2.0, key="small", capacity=5.0), large])
    assert refused.refused == 1
    assert (await store.take_tokens([take(2.0, key="small", capacity=5.0)])).refused is None
    both = await store.take_tokens([small, large])
    assert both.refused == 1, "the one that takes longest to fill"
    assert both.retry_after_s == pytest.approx(6.0 / SLOW, rel=0.01)
    assert await store.take_tokens([]) == (None, 0.0)


async def test_more_than_a_bucket_can_hold_waits_for_a_full_one_and_leaves_a_debt(store: Store) -> None:
    assert (await store.take_tokens([take(25.0)])).refused is None
    refused = await store.take_tokens([take(25.0)])
    assert refused.retry_after_s == pytest.approx(25.0 / SLOW, rel=0.01)
    assert (await store.take_tokens([take(0.5)])).retry_after_s == pytest.approx(15.5 / SLOW, rel=0.01)


async def test_a_forced_take_counts_in_any_case(store: Store) -> None:
    assert (await store.take_tokens([take(10.0)])).refused is None
    assert (await store.take_tokens([take(5.0)], is_forced=True)) == (None, 0.0)
    assert (await store.take_tokens([take(1.0)])).retry_after_s == pytest.approx(6.0 / SLOW, rel=0.01)


async def test_tokens_are_given_back_up_to_the_capacity(store: Store) -> None:
    assert (await store.take_tokens([take(10.0)])).refused is None
    assert (await store.take_tokens([take(-4.0)])).refused is None
    assert (await store.take_tokens([take(5.0)])).refused == 0
    assert (await store.take_tokens([take(-100.0)])).refused is None
    assert (await store.take_tokens([take(10.0)])).refused is None
    assert (await store.take_tokens([take(1.0)])).refused == 0


async def test_a_limit_that_was_lowered_holds_at_once(store: Store) -> None:
    assert (await store.take_tokens([take(1.0, capacity=100.0)])).refused is None
    assert (await store.take_tokens([take(2.0, capacity=2.0)])).refused is None
    assert (await store.take_tokens([take(1.0, capacity=2.0)])).refused == 0


async def test_many_takers_get_no_more_than_there_is(store: Store) -> None:
    taken = await asyncio.gather(*(store.take_tokens([take(1.0)]) for _ in range(30)))
    assert sum(one.refused is None for one in taken) == 10


async def test_slots_are_limited_and_come_back(store: Store) -> None:
    assert await store.acquire_slot("s", "a", limit=2, ttl_s=60.0)
    assert await store.acquire_slot("s", "b", limit=2, ttl_s=60.0)
    assert not await store.acquire_slot("s", "c", limit=2, ttl_s=60.0)
    assert await store.acquire_slot("s", "a", limit=2, ttl_s=60.0), "whoever holds one may ask again"
    assert await store.acquire_slot("other", "c", limit=2, ttl_s=60.0)
    await store.release_slot("s", "b")
    await store.release_slot("s", "b")
    assert await store.acquire_slot("s", "c", limit=2, ttl_s=60.0)
    assert not await store.acquire_slot("s", "b", limit=2, ttl_s=60.0)


async def test_a_slot_whose_holder_died_comes_back_with_its_lease(store: Store, let_pass: Pass) -> None:
    assert await store.acquire_slot("s", "dead", limit=2, ttl_s=0.2)
    assert await store.acquire_slot("s", "alive", limit=2, ttl_s=0.2)
    await store.renew_slots("s", ["alive"], ttl_s=60.0)
    assert not await store.acquire_slot("s", "new", limit=2, ttl_s=60.0)
    await let_pass(0.25)
    assert await store.acquire_slot("s", "new", limit=2, ttl_s=60.0)
    assert not await store.acquire_slot("s", "newer", limit=2, ttl_s=60.0)


async def test_renewing_tells_a_store_that_forgot(store: Store) -> None:
    await store.renew_slots("s", ["a", "b"], ttl_s=60.0)
    assert not await store.acquire_slot("s", "c", limit=2, ttl_s=60.0)
    await store.renew_slots("s", ["c"], ttl_s=60.0)  # it was let in while the store was away
    await store.release_slot("s", "a")
    assert not await store.acquire_slot("s", "d", limit=2, ttl_s=60.0)


async def test_one_of_many_gets_the_last_slot(store: Store) -> None:
    won = await asyncio.gather(*(store.acquire_slot("s", str(n), limit=1, ttl_s=60.0) for n in range(20)))
    assert sum(won) == 1


async def test_deleting_buckets_and_slots(store: Store) -> None:
    assert (await store.take_tokens([take(10.0)])).refused is None
    assert await store.acquire_slot("s", "a", limit=1, ttl_s=60.0)
    assert await store.scan("") == {}, "neither is a value"
    await store.delete("b")
    await store.delete("s")
    assert (await store.take_tokens([take(10.0)])).refused is None
    assert await store.acquire_slot("s", "b", limit=1, ttl_s=60.0)


async def test_an_outage_of_the_memory_store_refuses_limits_too() -> None:
    store = MemoryStore(ManualClock())
    store.set_available(False)
    for call in (
        store.take_tokens([take(1.0)]),
        store.acquire_slot("s", "a", limit=1, ttl_s=1.0),
        store.renew_slots("s", ["a"], ttl_s=1.0),
        store.release_slot("s", "a"),
    ):
        with pytest.raises(StoreUnavailable):
            await call
