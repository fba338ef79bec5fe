"""API keys in the shared store: made, revoked and followed by every gateway of the cluster.

A key of the store per API key, and a random word that is another one after every change, so that a gateway which looks
once a second asks one question and reads everything only after a change. Whoever makes a change draws the word after
it; whoever reads asks for the word first: what is missed meanwhile is read at the next look. (A counter would begin
anew in a store that lost its data, and could come to a number that somebody has seen.)

A store that lost its data (an embedded one that was started again) learns the keys from the gateways, who remember:
each tells it whatever it knows and does not find there, and revocations above all, so that no key comes back to life,
whichever gateway was the first to look.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime

from pydantic import ValidationError

from core.errors import InvalidRequest, StoreUnavailable
from core.store import Store
from router.access.config import ApiKeyConfig
from router.access.keys import KeyRing

_log = logging.getLogger(__name__)
_ATTEMPTS = 5


class SharedKeys:
    """One gateway's view of them.

    Concurrency: one event loop. Every method raises StoreUnavailable.
    """

    def __init__(self, store: Store, cluster: str, now: Callable[[], datetime]) -> None:
        self._store = store
        self._prefix = f"tandem:{cluster}:access:key:"
        self._word_key = f"tandem:{cluster}:access:changed"
        self._now = now
        self._word: bytes | None = None
        self._is_read = False
        self._ring = KeyRing()

    async def refresh(self) -> KeyRing | None:
        """Return the keys if something has changed since the last time."""
        word = await self._store.get(self._word_key)
        if self._is_read and word == self._word:
            return None
        ring = await self._read_all()
        if lost := [key for key in self._ring.all() if _is_lost(key, ring)]:
            await self._remind(lost)
            word = await self._store.get(self._word_key)
            ring = await self._read_all()
        self._ring, self._word, self._is_read = ring, word, True
        return ring

    async def add(self, key: ApiKeyConfig) -> None:
        """Keep a new key. Raises: InvalidRequest, when one of this fingerprint is there."""
        if not await self._store.compare_and_set(self._prefix + key.fingerprint, None, _write(key)):
            raise InvalidRequest("fingerprint", f"there is a key {key.fingerprint} already")
        await self._tell()

    async def revoke(self, key: ApiKeyConfig) -> ApiKeyConfig:
        """Mark a key as revoked, wherever it comes from, and return it so. One that is revoked stays as it is."""
        name = self._prefix + key.fingerprint
        for _ in range(_ATTEMPTS):
            held = await self._store.get(name)
            kept = (_read(name, held) if held is not None else None) or key
            if kept.revoked_at is None:
                kept = kept.model_copy(update={"revoked_at": key.revoked_at or self._now()})
            if await self._store.compare_and_set(name, held, _write(kept)):
                await self._tell()  # of an old one, too: who marked it may have been cut off before it could tell
                return kept
        raise StoreUnavailable(f"key {key.fingerprint} changes all the time")

    async def _tell(self) -> None:
        await self._store.put(self._word_key, secrets.token_hex(8).encode())

    async def _read_all(self) -> KeyRing:
        found = await self._store.scan(self._prefix)
        return KeyRing(key for name, value in found.items() if (key := _read(name, value)) is not None)

    async def _remind(self, keys: Sequence[ApiKeyConfig]) -> None:
        _log.warning("the shared store lost API keys; it is told %d again", len(keys))
        has_news = False
        for key in keys:
            if key.revoked_at is not None:
                await self.revoke(key)
            elif await self._store.compare_and_set(self._prefix + key.fingerprint, None, _write(key)):
                has_news = True
        if has_news:
            await self._tell()


def _is_lost(key: ApiKeyConfig, ring: KeyRing) -> bool:
    found = ring.find(key.sha256)
    return found is None or (key.revoked_at is not None and found.revoked_at is None)


def _write(key: ApiKeyConfig) -> bytes:
    return key.model_dump_json().encode()


def _read(name: str, value: bytes) -> ApiKeyConfig | None:
    try:
        key = ApiKeyConfig.model_validate_json(value)
    except ValidationError as error:
        _log.error("%s is no API key: %d problems", name, error.error_count())
        return None
    if not name.endswith(key.fingerprint):
        _log.error("%s holds another key's record", name)
        return None
    return key
