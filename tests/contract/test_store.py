"""One suite for both implementations of the store port: whatever holds for Redis holds for the memory store."""

import asyncio

import pytest

from core.clock import ManualClock
from core.errors import ConfigError, StoreUnavailable
from core.store import STREAM_START, Store
from core.store_memory import MemoryStore
from core.store_redis import RedisStore
from tests.contract.conftest import Pass


async def test_put_get_delete(store: Store) -> None:
    assert await store.get("k") is None
    await store.put("k", b"\x00\xff")
    assert await store.get("k") == b"\x00\xff"
    await store.put("k", b"")
    assert await store.get("k") == b""
    await store.delete("k")
    await store.delete("k")
    assert await store.get("k") is None


async def test_a_lease_ends_unless_renewed(store: Store, let_pass: Pass) -> None:
    await store.put("leased", b"1", ttl_s=0.2)
    await store.put("renewed", b"2", ttl_s=0.2)
    await store.put("renewed", b"3", ttl_s=30.0)
    await store.put("made permanent", b"4", ttl_s=0.2)
    await store.put("made permanent", b"5")
    await let_pass(0.25)
    assert await store.get("leased") is None
    assert await store.get("renewed") == b"3"
    assert await store.scan("") == {"renewed": b"3", "made permanent": b"5"}


async def test_scan_takes_the_prefix_literally(store: Store) -> None:
    for key in ("a*:1", "a?:1", "ab:1", "[a]:1", "a\\:1", "other"):
        await store.put(key, key.encode())
    await store.append("a*:stream", b"not a value", max_entries=10)
    assert await store.scan("a*:") == {"a*:1": b"a*:1"}
    assert await store.scan("a?:") == {"a?:1": b"a?:1"}
    assert await store.scan("[a]:") == {"[a]:1": b"[a]:1"}
    assert await store.scan("a\\:") == {"a\\:1": b"a\\:1"}
    assert await store.scan("none") == {}


async def test_scan_is_complete_beyond_one_batch(store: Store) -> None:
    keys = {f"many:{n}": str(n).encode() for n in range(1500)}
    await asyncio.gather(*(store.put(key, value) for key, value in keys.items()))
    assert await store.scan("many:") == keys


async def test_increment_counts_from_one_and_never_repeats(store: Store) -> None:
    assert await store.increment("n") == 1
    assert sorted(await asyncio.gather(*(store.increment("n") for _ in range(10)))) == list(range(2, 12))
    assert await store.get("n") == b"11"


async def test_compare_and_set(store: Store, let_pass: Pass) -> None:
    assert not await store.compare_and_set("k", b"absent", b"x")
    assert await store.compare_and_set("k", None, b"1")
    assert not await store.compare_and_set("k", None, b"2")
    assert not await store.compare_and_set("k", b"other", b"2")
    assert await store.get("k") == b"1"
    assert await store.compare_and_set("k", b"1", b"", ttl_s=0.2)
    assert not await store.compare_and_set("k", None, b"2")  # holds an empty value: is not absent
    await let_pass(0.25)
    assert await store.compare_and_set("k", None, b"3")


async def test_compare_and_set_lets_one_of_many_win(store: Store) -> None:
    won = await asyncio.gather(*(store.compare_and_set("leader", None, str(n).encode()) for n in range(10)))
    assert sum(won) == 1
    assert await store.get("leader") == str(won.index(True)).encode()


async def test_a_stream_is_read_in_order_and_from_where_one_stopped(store: Store) -> None:
    ids = [await store.append("s", str(n).encode(), max_entries=100) for n in range(5)]
    assert len(set(ids)) == 5
    first = (await store.read({"s": STREAM_START}, max_entries=2, wait_s=0.0))["s"]
    assert [entry.value for entry in first] == [b"0", b"1"]
    assert [entry.entry_id for entry in first] == ids[:2]
    rest = (await store.read({"s": first[-1].entry_id}, max_entries=100, wait_s=0.0))["s"]
    assert [entry.value for entry in rest] == [b"2", b"3", b"4"]
    assert await store.read({"s": ids[-1], "t": STREAM_START}, max_entries=100, wait_s=0.0) == {}


async def test_reading_waits_for_the_first_entry_of_any_stream(store: Store) -> None:
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        reading = group.create_task(store.read({"s": STREAM_START, "t": STREAM_START}, max_entries=10, wait_s=8.0))
        group.create_task(store.append("t", b"news", max_entries=10))
    assert [entry.value for entry in reading.result()["t"]] == [b"news"]
    assert "s" not in reading.result()


async def test_reading_ends_empty_when_nothing_comes(store: Store) -> None:
    async with asyncio.timeout(10):
        assert await store.read({"s": STREAM_START}, max_entries=10, wait_s=0.05) == {}
        assert await store.read({"s": STREAM_START}, max_entries=10, wait_s=0.0001) == {}
        assert await store.read({}, max_entries=10, wait_s=5.0) == {}


async def test_a_stream_is_trimmed(store: Store) -> None:
    for n in range(1000):
        await store.append("s", str(n).encode(), max_entries=100)
    kept = (await store.read({"s": STREAM_START}, max_entries=1000, wait_s=0.0))["s"]
    assert 100 <= len(kept) <= 300  # about: Redis drops whole nodes of its list
    assert kept[-1].value == b"999"


async def test_deleting_a_stream(store: Store) -> None:
    await store.append("s", b"1", max_entries=10)
    await store.delete("s")
    assert await store.read({"s": STREAM_START}, max_entries=10, wait_s=0.0) == {}


async def test_memory_store_outage() -> None:
    store = MemoryStore(ManualClock())
    await store.put("k", b"1")
    store.set_available(False)
    for call in (store.get("k"), store.increment("n"), store.append("s", b"", max_entries=1), store.ping()):
        with pytest.raises(StoreUnavailable):
            await call
    store.set_available(True)
    assert await store.get("k") == b"1"


def test_a_bad_url_is_a_config_error() -> None:
    for url in ("localhost:6379", "http://localhost", "redis://localhost:port"):
        with pytest.raises(ConfigError, match=r"redis\.url"):
            RedisStore(url)
