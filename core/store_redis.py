"""The store port over a real Redis 6.2+ or Valkey. The only importer of `redis`.

Every call runs under a deadline and turns whatever goes wrong into `StoreUnavailable`; the connection pool reconnects
by itself at the next call, so an outage needs no handling here. A call whose connection turns out to be stale (the
server was restarted) is tried once more at once on a fresh one.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import redis.asyncio as aioredis
from redis.asyncio.connection import RedisSSLContext, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.errors import ConfigError, StoreUnavailable
from core.store import LeasedAppend, StreamEntry, Taken
from core.store_redis_scripts import COMPARE_AND_SET, HOLD_SLOTS, TAKE_TOKENS
from core.tls import ClientTls, client_context
from core.token_bucket import BucketTake

_FIELD = b"v"
_SCAN_BATCH = 512
_MAX_CONNECTIONS = 64


class RedisStore:
    """Implements `core.store.Store`.

    Args:
        url: redis://, rediss:// or unix://; may carry a password, which is never shown.
        deadline_s: of every call; of `read` it comes on top of the wait asked for.
        tls: of a rediss:// URL; None: what the system trusts, or what the URL's own parameters say.

    Raises:
        ConfigError: the URL is malformed, or does not go with `tls`.
    """

    def __init__(self, url: str, *, deadline_s: float = 1.0, tls: ClientTls | None = None) -> None:
        self._deadline_s = deadline_s
        try:
            self._name = _without_password(url)
            ours = {
                "max_connections": _MAX_CONNECTIONS,
                "timeout": None,  # calls beyond it queue, under our own deadline
                "socket_connect_timeout": deadline_s,
                "socket_timeout": None,  # our own deadline covers it, and blocking reads must outlast a fixed one
                "retry": Retry(NoBackoff(), 1),
                "protocol": 2,  # every server speaks it, and it has no push messages
            }
            pool = aioredis.BlockingConnectionPool(**(ours | _connection_options(url, tls)))
            self._client = aioredis.Redis.from_pool(pool)
            self._compare_and_set = self._client.register_script(COMPARE_AND_SET)
            self._take_tokens = self._client.register_script(TAKE_TOKENS)
            self._hold_slots = self._client.register_script(HOLD_SLOTS)
        except ValueError as error:
            raise ConfigError(f"redis.url: {error}") from error

    async def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        async with self._translated():
            await self._client.set(key, value, px=_milliseconds(ttl_s))

    async def get(self, key: str) -> bytes | None:
        async with self._translated():
            return cast(bytes | None, await self._client.get(key))

    async def delete(self, key: str) -> None:
        async with self._translated():
            await self._client.delete(key)

    async def scan(self, prefix: str) -> Mapping[str, bytes]:
        pattern = "".join(f"[{char}]" if char in "*?[" else "\\\\" if char == "\\" else char for char in prefix) + "*"
        async with self._translated():
            found: set[bytes] = {key async for key in self._client.scan_iter(match=pattern, count=_SCAN_BATCH)}
            keys = sorted(found)  # SCAN may repeat a key
            values: list[bytes | None] = []
            for start in range(0, len(keys), _SCAN_BATCH):
                values += cast(list[bytes | None], await self._client.mget(keys[start : start + _SCAN_BATCH]))
        return {key.decode(): value for key, value in zip(keys, values, strict=True) if value is not None}

    async def increment(self, key: str) -> int:
        async with self._translated():
            return int(await self._client.incr(key))

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes, *, ttl_s: float | None = None
    ) -> bool:
        milliseconds = _milliseconds(ttl_s)
        arguments = ("0" if expected is None else "1", expected or b"", value, milliseconds or "")
        async with self._translated():
            return bool(await self._compare_and_set([key], arguments))

    async def append(self, stream: str, value: bytes, *, max_entries: int) -> str:
        async with self._translated():
            entry_id = await self._client.xadd(stream, {_FIELD: value}, maxlen=max_entries, approximate=True)
        return cast(bytes, entry_id).decode()

    async def append_leased(self, appends: Sequence[LeasedAppend]) -> Sequence[bool]:
        if not appends:
            return []
        async with self._translated(), self._client.pipeline(transaction=True) as pipeline:
            for one in appends:
                if one.is_first:
                    pipeline.xtrim(one.stream, maxlen=0, approximate=False)  # unlike a deletion, ids then go on
                pipeline.xadd(
                    one.stream,
                    {_FIELD: one.value},
                    maxlen=one.max_entries,
                    approximate=True,
                    nomkstream=not one.is_first,
                )
                pipeline.pexpire(one.stream, _at_least_1_ms(one.ttl_s))
            answers = iter(await pipeline.execute())
        done = []
        for one in appends:
            if one.is_first:
                next(answers)
            done.append(next(answers) is not None)
            next(answers)
        return done

    async def read(
        self, streams: Mapping[str, str], *, max_entries: int, wait_s: float
    ) -> Mapping[str, list[StreamEntry]]:
        if not streams:
            return {}
        block = max(1, round(wait_s * 1000)) if wait_s > 0 else None  # BLOCK 0 would mean for ever
        async with self._translated(extra_s=max(0.0, wait_s)):
            answer = await self._client.xread(dict[Any, Any](streams), count=max_entries, block=block)
        return {
            name.decode(): [StreamEntry(entry_id.decode(), fields[_FIELD]) for entry_id, fields in entries]
            for name, entries in cast(list[Any], answer)
        }

    async def take_tokens(self, takes: Sequence[BucketTake], *, is_forced: bool = False) -> Taken:
        if not takes:
            return Taken(None, 0.0)
        arguments: list[float] = [int(is_forced)]
        for take in takes:
            arguments += [take.amount, take.capacity, take.refill_per_s]
        async with self._translated():
            number, wait_us = await self._take_tokens([take.key for take in takes], arguments)
        return Taken(number - 1 if number else None, wait_us / 1e6)

    async def acquire_slot(self, key: str, holder: str, *, limit: int, ttl_s: float) -> bool:
        async with self._translated():
            return bool(await self._hold_slots([key], [_at_least_1_ms(ttl_s), limit, holder]))

    async def renew_slots(self, key: str, holders: Sequence[str], *, ttl_s: float) -> None:
        async with self._translated():
            await self._hold_slots([key], [_at_least_1_ms(ttl_s), "", *holders])

    async def release_slot(self, key: str, holder: str) -> None:
        async with self._translated():
            await self._client.zrem(key, holder)

    async def ping(self) -> None:
        async with self._translated():
            await cast(Awaitable[Any], self._client.ping())

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):  # the server may be gone already: then there is nothing to close
            await self._client.aclose()

    @contextlib.asynccontextmanager
    async def _translated(self, extra_s: float = 0.0) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._deadline_s + extra_s):
                yield
        except TimeoutError as error:
            raise StoreUnavailable(f"Redis at {self._name}: no answer within {self._deadline_s:g} s") from error
        except (RedisError, OSError, ConfigError) as error:  # the last: certificates that broke meanwhile
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreUnavailable(f"Redis at {self._name}: {reason}") from error


class _TlsConnection(aioredis.SSLConnection):
    """Reads its certificates whenever it connects, so that new ones are used without a restart."""

    def __init__(self, *, tls: ClientTls, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context = _CurrentContext(tls)


class _CurrentContext(RedisSSLContext):
    """What the library asks for a context."""

    __slots__ = ("_tls",)

    def __init__(self, tls: ClientTls) -> None:
        super().__init__()
        self._tls = tls

    def get(self) -> ssl.SSLContext:
        return client_context(self._tls)


def _connection_options(url: str, tls: ClientTls | None) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_url(url))
    if tls is None:
        return options
    if options.get("connection_class") is not aioredis.SSLConnection:
        raise ConfigError("redis.tls: the URL must begin with rediss://")
    if tls.server_name:
        raise ConfigError("redis.tls.server_name: Redis is known by the host of its URL")
    client_context(tls)  # what cannot be used is told now
    return options | {"connection_class": _TlsConnection, "tls": tls}


def _milliseconds(ttl_s: float | None) -> int | None:
    return None if ttl_s is None else _at_least_1_ms(ttl_s)


def _at_least_1_ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
