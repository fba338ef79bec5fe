"""Both implementations of the store port, for the suites that hold for either."""

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from core.clock import ManualClock
from core.store import Store
from core.store_memory import MemoryStore
from core.store_redis import RedisStore
from tests.redis_process import RedisProcess

_databases = itertools.count()
Pass = Callable[[float], Awaitable[None]]


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tandem-test-") as folder, RedisProcess(Path(folder)) as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(backend: str, clock: ManualClock, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if backend == "memory":
        yield MemoryStore(clock)
        return
    url = request.getfixturevalue("redis_url")
    store = RedisStore(f"{url}?db={next(_databases)}", deadline_s=5.0)
    yield store
    await store.close()


@pytest.fixture
async def let_pass(backend: str, clock: ManualClock) -> Pass:
    """Let a lease run out: on the manual clock, or in earnest."""

    async def turn(seconds: float) -> None:
        clock.advance(seconds)
        if backend == "redis":
            await asyncio.sleep(seconds)

    return turn
