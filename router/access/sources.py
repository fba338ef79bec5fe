"""Where API keys come from, and how the gatekeeper keeps up with them: a file, and the shared store.

A source that cannot be read leaves what was read last in force, and says so once: an outage neither lets anybody in nor
locks anybody out. The price is that a key revoked in the store meanwhile works until the store is back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from core.config import load_config
from core.errors import ConfigError, InvalidRequest, ServingError
from core.store import Store
from router.access.config import ApiKeyConfig, KeysFile
from router.access.gatekeeper import Gatekeeper
from router.access.keys import KeyRing, checked_key, new_key
from router.access.principal import Role
from router.access.shared_keys import SharedKeys

FILE, SHARED = "file", "shared"
_log = logging.getLogger(__name__)


class KeySources:
    """Feeds one gatekeeper, and changes what is in the shared store.

    Concurrency: one event loop; `run` is one task.
    """

    def __init__(
        self,
        gatekeeper: Gatekeeper,
        store: Store,
        cluster: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._gatekeeper = gatekeeper
        self._config = gatekeeper.config
        self._shared = SharedKeys(store, cluster, now) if self._config.shared_keys else None
        self._now = now
        self._file_stamp: tuple[int, int, int] | None = None
        self._problems: dict[str, str] = {}

    async def load(self) -> None:
        """Read everything for the first time. A store that does not answer is asked again later.

        Raises:
            ConfigError: the file cannot be read; a gateway should not start with half its keys.
        """
        if self._config.keys_file is not None:
            await self._read_file(self._config.keys_file)
        await self._try(SHARED, self._read_shared)

    async def run(self) -> None:
        """Keep up, until cancelled."""
        while True:
            await asyncio.sleep(self._config.reload_interval_s)
            await self.look()

    async def look(self) -> None:
        """Read what has changed."""
        if (path := self._config.keys_file) is not None:
            await self._try(FILE, partial(self._read_file, path))
        await self._try(SHARED, self._read_shared)

    async def create(
        self, name: str, tenant: str, roles: frozenset[Role], lifetime_s: float | None
    ) -> tuple[ApiKeyConfig, str]:
        """Make a key that the whole cluster knows within a moment. Returns what is kept of it, and the key itself.

        Raises:
            InvalidRequest: a bad name, tenant or lifetime.
            ConfigError: access control is off, or keys are not shared.
            StoreUnavailable: it may be there or not, and nobody knows it.
        """
        shared = self._require_shared()
        secret, now = new_key(), self._now()
        key = checked_key(name, tenant, roles, secret, now, lifetime_s)
        await shared.add(key)
        await self._try(SHARED, self._read_shared)
        return key, secret

    async def revoke(self, fingerprint: str) -> tuple[str, ApiKeyConfig]:
        """End a key of any source. Returns its source and the key.

        Raises:
            InvalidRequest: there is no such key.
            ConfigError: access control is off, or keys are not shared.
            StoreUnavailable: it may be revoked or not.
        """
        shared = self._require_shared()
        await self._try(SHARED, self._read_shared)  # it may have been made a moment ago, elsewhere
        found = [(source, key) for source, key in self._all() if key.fingerprint == fingerprint]
        if not found:
            raise InvalidRequest("fingerprint", "no API key has it")
        source, key = found[0]
        revoked = await shared.revoke(key)
        await self._try(SHARED, self._read_shared)
        return source, revoked

    async def list_all(self) -> list[tuple[str, ApiKeyConfig]]:
        """Return every key with its source, oldest first."""
        await self._try(SHARED, self._read_shared)  # one may have been made a moment ago, elsewhere
        return self._all()

    def _all(self) -> list[tuple[str, ApiKeyConfig]]:
        """Return each once: a mark of revocation in the store counts for a key of any source."""
        found: dict[str, tuple[str, ApiKeyConfig]] = {}
        for source, ring in self._gatekeeper.rings():
            for key in ring.all():
                held_source, held = found.get(key.fingerprint, (source, key))
                found[key.fingerprint] = (held_source, key if held.revoked_at is None else held)
        oldest = datetime.min.replace(tzinfo=UTC)
        return sorted(found.values(), key=lambda one: (one[1].created_at or oldest, one[1].name))

    def _require_shared(self) -> SharedKeys:
        if not self._config.enabled:
            raise ConfigError("access control is off: set router.access.enabled, and a first key with `tandem keys`")
        if self._shared is None:
            raise ConfigError("router.access.shared_keys is off")
        return self._shared

    async def _read_shared(self) -> None:
        if self._shared is not None and (ring := await self._shared.refresh()) is not None:
            self._gatekeeper.replace_ring(SHARED, ring)

    async def _read_file(self, path: Path) -> None:
        stamp = await asyncio.to_thread(_stamp_of, path)
        if stamp is not None and stamp == self._file_stamp:
            return
        content = await asyncio.to_thread(load_config, KeysFile, path)
        self._gatekeeper.replace_ring(FILE, KeyRing(content.keys))
        self._file_stamp = stamp
        _log.info("%d API keys in %s", len(content.keys), path)

    async def _try(self, source: str, read: Callable[[], Awaitable[None]]) -> None:
        try:
            await read()
        except ServingError as error:
            if self._problems.get(source) != str(error):
                _log.error("API keys (%s): those read last stay in force: %s", source, error)
                self._problems[source] = str(error)
        else:
            if self._problems.pop(source, None) is not None:
                _log.info("API keys (%s) are read again", source)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
