"""Streams that live on a lease: one suite for both implementations of the store port."""

import asyncio

import pytest

from core.clock import ManualClock
from core.errors import StoreUnavailable
from core.store import STREAM_START, LeasedAppend, Store
from core.store_memory import MemoryStore
from tests.contract.conftest import Pass

LONG_S = 60.0


def entry(
    value: bytes, *, stream: str = "s", ttl_s: float = LONG_S, max_entries: int = 1000, first: bool = False
) -> LeasedAppend:
    return LeasedAppend(stream, value, ttl_s, max_entries, is_first=first)


async def values(store: Store, stream: str = "s") -> list[bytes]:
    read = await store.read({stream: STREAM_START}, max_entries=10_000, wait_s=0.0)
    return [one.value for one in read.get(stream, [])]


async def test_a_stream_must_be_begun_and_only_then_grows(store: Store) -> None:
    assert await store.append_leased([entry(b"1")]) == [False]
    assert await values(store) == []
    assert await store.append_leased([entry(b"1", first=True), entry(b"2")]) == [True, True]
    assert await store.append_leased([entry(b"3")]) == [True]
    assert await values(store) == [b"1", b"2", b"3"]


async def test_beginning_again_drops_what_was_there_and_ids_go_on(store: Store) -> None:
    assert await store.append_leased([entry(b"old", first=True)]) == [True]
    cursor = (await store.read({"s": STREAM_START}, max_entries=1, wait_s=0.0))["s"][0].entry_id
    assert await store.append_leased([entry(b"new", first=True), entry(b"er")]) == [True, True]
    assert await values(store) == [b"new", b"er"]
    read = await store.read({"s": cursor}, max_entries=10, wait_s=0.0)
    assert [one.value for one in read["s"]] == [b"new", b"er"], "a reader of the old one meets the new one"


async def test_several_streams_in_one_step_each_with_its_own_answer(store: Store) -> None:
    first = await store.append_leased([entry(b"a", stream="a", first=True), entry(b"b", stream="b")])
    assert first == [True, False]
    assert await store.append_leased([entry(b"b", stream="b"), entry(b"A", stream="a")]) == [False, True]
    assert (await values(store, "a"), await values(store, "b")) == ([b"a", b"A"], [])
    assert await store.append_leased([]) == []


async def test_a_stream_vanishes_with_its_lease_unless_it_grows(store: Store, let_pass: Pass) -> None:
    await store.append_leased(
        [entry(b"1", stream=name, ttl_s=0.2, first=True) for name in ("lapses", "grows", "shortened")]
    )
    await store.append_leased([entry(b"2", stream="grows"), entry(b"2", stream="shortened", ttl_s=0.1)])
    await let_pass(0.25)
    assert await values(store, "lapses") == []
    assert await values(store, "grows") == [b"1", b"2"]
    assert await values(store, "shortened") == []
    assert await store.append_leased([entry(b"3", stream="lapses")]) == [False]


async def test_it_is_trimmed(store: Store) -> None:
    await store.append_leased([entry(b"0", first=True)])
    for start in range(1, 1000, 100):
        await store.append_leased(
            [entry(str(n).encode(), max_entries=100) for n in range(start, min(1000, start + 100))]
        )
    kept = await values(store)
    assert 100 <= len(kept) <= 300
    assert kept[-1] == b"999"


async def test_a_reader_that_waits_is_woken(store: Store) -> None:
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        reading = group.create_task(store.read({"s": STREAM_START}, max_entries=10, wait_s=8.0))
        group.create_task(store.append_leased([entry(b"news", first=True)]))
    assert [one.value for one in reading.result()["s"]] == [b"news"]


async def test_deleting_one(store: Store) -> None:
    await store.append_leased([entry(b"1", first=True)])
    await store.delete("s")
    assert await values(store) == []
    assert await store.append_leased([entry(b"2")]) == [False]


async def test_an_outage_of_the_memory_store() -> None:
    store = MemoryStore(ManualClock())
    store.set_available(False)
    with pytest.raises(StoreUnavailable):
        await store.append_leased([entry(b"1", first=True)])
