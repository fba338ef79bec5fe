"""The record of what operators did and of what others tried: one JSON line per admin action, in a log of its own.

A line has the time, the gateway, who (the name of a key, token or certificate, never a secret), from where, the
action, its target, and the outcome: ok, or the reason of the refusal or failure. JSON escapes what could break a line.
"""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from core.errors import ConfigError

LOGGER = "tandem.audit"
_MAX_TARGET_CHARACTERS = 200


class AuditLog:
    """Of one gateway.

    Concurrency: the event loop's thread.
    """

    def __init__(self, gateway: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._gateway = gateway
        self._now = now
        self._logger = logging.getLogger(LOGGER)
        self._logger.setLevel(logging.INFO)  # whatever the level of the log is
        self._handler: logging.FileHandler | None = None

    def open(self, file: Path) -> None:
        """From now on lines go to the end of this file too, by themselves.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            self._handler = logging.FileHandler(file, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"router.access.audit_file: {file}: cannot write: {error.strerror}") from error
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def write(self, *, who: str, origin: str, action: str, target: str, outcome: str) -> None:
        """Add a line."""
        line = {
            "time": self._now().isoformat(timespec="milliseconds"),
            "gateway": self._gateway,
            "who": who,
            "from": origin,
            "action": action,
            "target": target[:_MAX_TARGET_CHARACTERS],
            "outcome": outcome,
        }
        record = self._logger.makeRecord(LOGGER, logging.INFO, "", 0, json.dumps(line), (), None)
        if self._handler is not None:
            self._handler.emit(record)
        self._logger.handle(record)

    def close(self) -> None:
        if self._handler is not None:
            self._handler.close()
