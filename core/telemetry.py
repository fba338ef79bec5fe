"""Logs and metrics as every process of Tandem writes them.

Logs go to standard error, one line per record, with the component's name; metrics are called
`tandem_<component>_<name>_<unit>` and live in a registry that belongs to one service, so that two services in one
process (tests, `colocated`) never collide.
"""

import logging
import sys
import threading
from typing import TextIO
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from core.errors import ConfigError

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def setup_logging(component: str, *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send this process's log records to `stream` (standard error), replacing what was configured before.

    Raises:
        ConfigError: no such level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"log level {level!r}: must be one of {', '.join(logging.getLevelNamesMapping())}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_OneLine(component))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


class _OneLine(logging.Formatter):
    """Time, level letter, component, module, message. A traceback follows on lines of its own."""

    def __init__(self, component: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname).1s {component} %(name)s: %(message)s", "%H:%M:%S")


class MetricsServer:
    """Serves one registry at http://host:port/metrics from a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Bind and serve; port 0 takes a free one.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self, deadline_s: float = 5.0) -> None:
        """Stop serving and join the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(deadline_s)
