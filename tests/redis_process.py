"""A real redis-server on a Unix socket, for tests that need one they can kill and start again."""

import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.redis_server import executable


class RedisProcess:
    """Context manager. The socket's path, so the URL, stays the same over restarts; the data does not."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self, deadline_s: float = 10.0) -> None:
        command = [executable(), "--port", "0", "--unixsocket", str(self._socket)]
        quiet = [
            "--databases",
            "100",
            "--save",
            "",
            "--appendonly",
            "no",
            "--loglevel",
            "warning",
            "--dir",
            str(self._socket.parent),
        ]
        self._process = subprocess.Popen([*command, *quiet], stdout=subprocess.DEVNULL)
        until = time.monotonic() + deadline_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"redis-server did not start (exit code {self._process.poll()})")
            time.sleep(0.01)  # the server offers no event for "I listen"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._socket))
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith(b"+PONG")
            except OSError:
                return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
