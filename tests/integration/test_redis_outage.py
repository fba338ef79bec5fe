"""The Redis store while its server dies, hangs and comes back."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from core.errors import StoreUnavailable
from core.store import STREAM_START
from core.store_redis import RedisStore
from tests.redis_process import RedisProcess


@pytest.fixture
def server() -> Iterator[RedisProcess]:
    with tempfile.TemporaryDirectory(prefix="tandem-test-") as folder, RedisProcess(Path(folder)) as server:
        yield server


@pytest.fixture
async def store(server: RedisProcess) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url, deadline_s=2.0)
    yield store
    await store.close()


async def test_reconnects_by_itself(server: RedisProcess, store: RedisStore) -> None:
    await store.put("k", b"1")
    server.kill()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"redis\.sock"):
            await store.get("k")
    server.start()
    assert await store.get("k") is None  # at the first call, without anybody's help
    await store.put("k", b"2")
    assert await store.get("k") == b"2"


async def test_a_stale_connection_is_no_failure(server: RedisProcess, store: RedisStore) -> None:
    await asyncio.gather(*(store.put(f"k{n}", b"1") for n in range(8)))
    server.kill()
    server.start()
    await asyncio.gather(*(store.put(f"k{n}", b"2") for n in range(8)))


async def test_a_waiting_reader_is_told_of_the_death(server: RedisProcess, store: RedisStore) -> None:
    await store.ping()
    reading = asyncio.create_task(store.read({"s": STREAM_START}, max_entries=1, wait_s=60.0))
    await _until_a_reader_waits(store)
    server.kill()
    async with asyncio.timeout(10):
        with pytest.raises(StoreUnavailable):
            await reading


async def test_a_hung_server_costs_one_deadline(server: RedisProcess, store: RedisStore) -> None:
    await store.put("k", b"1")
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnavailable, match="no answer within"):
                await store.get("k")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await store.get("k") == b"1"  # and the late answer is not taken for this one's
    assert await store.increment("n") == 1


async def test_an_abandoned_call_does_not_spoil_its_connection(store: RedisStore) -> None:
    await store.put("k", b"1")
    reading = asyncio.create_task(store.read({"s": STREAM_START}, max_entries=1, wait_s=60.0))
    await _until_a_reader_waits(store)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await store.append("s", b"late", max_entries=1)
    assert await asyncio.gather(*(store.get("k") for _ in range(8))) == [b"1"] * 8


async def test_a_password_is_never_shown(unused_tcp_port: int) -> None:
    store = RedisStore(f"redis://:s3cret@127.0.0.1:{unused_tcp_port}/0", deadline_s=1.0)
    with pytest.raises(StoreUnavailable) as caught:
        await store.ping()
    assert "s3cret" not in str(caught.value)
    assert f"127.0.0.1:{unused_tcp_port}" in str(caught.value)
    await store.close()


async def _until_a_reader_waits(store: RedisStore) -> None:
    """Ask the server itself, through EVAL: the port has no such call, and its answer is the only event there is."""
    async with asyncio.timeout(10):
        while b"blocked_clients:1" not in await store._client.eval("return redis.call('INFO', 'clients')", 0):
            continue
