"""API keys that come and go while gateways run: a file, and a real Redis that several gateways share."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from core.errors import AccessReason, ConfigError, InvalidRequest, StoreUnavailable, Unauthenticated
from core.store import Store
from core.store_memory import MemoryStore
from core.store_redis import RedisStore
from router.access.config import AccessConfig
from router.access.gatekeeper import Gatekeeper
from router.access.key_file import read_keys, write_keys
from router.access.keys import KeyRing, checked_key, new_key
from router.access.principal import Principal, Role
from router.access.sources import KeySources
from tests.redis_process import RedisProcess

INFERENCE = frozenset({Role.INFERENCE})
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as running:
        yield running


class Door:
    """The access part of one gateway."""

    def __init__(self, store: Store, cluster: str = "c", **more: Any) -> None:
        config = AccessConfig.model_validate({"enabled": True, "reload_interval_s": 0.01, **more})
        self.store = store
        self.gatekeeper = Gatekeeper(config, now=lambda: NOW)
        self.sources = KeySources(self.gatekeeper, store, cluster, now=lambda: NOW)

    async def admit(self, key: str) -> Principal:
        return await self.gatekeeper.admit([f"Bearer {key}"])

    async def refuses(self, key: str, reason: AccessReason) -> None:
        with pytest.raises(Unauthenticated) as caught:
            await self.admit(key)
        assert caught.value.reason is reason

    async def names(self) -> list[tuple[str, str]]:
        return [(source, key.name) for source, key in await self.sources.list_all()]


@asynccontextmanager
async def two_doors(redis: RedisProcess, cluster: str) -> AsyncIterator[tuple[Door, Door, RedisStore]]:
    stores = [RedisStore(redis.url, deadline_s=5.0) for _ in range(2)]
    doors = [Door(store, cluster) for store in stores]
    for door in doors:
        await door.sources.load()
    yield doors[0], doors[1], stores[0]
    for store in stores:
        await store.close()


async def test_a_key_made_at_one_gateway_opens_all_until_it_is_revoked_at_any(redis: RedisProcess) -> None:
    async with two_doors(redis, "made") as (one, other, _):
        key, secret = await one.sources.create("ann", "acme", INFERENCE, 60.0)
        assert await one.admit(secret) == Principal("ann", "acme", INFERENCE)
        await other.refuses(secret, AccessReason.INVALID_CREDENTIAL)
        await other.sources.look()
        assert await other.admit(secret) == Principal("ann", "acme", INFERENCE)
        assert (await other.sources.revoke(key.fingerprint))[1].revoked_at == NOW
        await other.refuses(secret, AccessReason.KEY_REVOKED)
        await one.admit(secret)
        await one.sources.look()
        await one.refuses(secret, AccessReason.KEY_REVOKED)
        again = await one.sources.revoke(key.fingerprint)
        assert again[1].revoked_at == NOW
        assert await one.names() == [("shared", "ann")]


async def test_nothing_in_the_store_tells_the_key(redis: RedisProcess) -> None:
    async with two_doors(redis, "secret") as (one, _, store):
        _, secret = await one.sources.create("ann", "acme", INFERENCE, None)
        kept = await store.scan("tandem:secret:access:")
        assert len(kept) == 2
        assert not any(secret.encode() in value or secret[4:].encode() in value for value in kept.values())


async def test_clusters_do_not_share_keys(redis: RedisProcess) -> None:
    async with two_doors(redis, "mine") as (mine, _, _), two_doors(redis, "yours") as (yours, _, _):
        _, secret = await mine.sources.create("ann", "", INFERENCE, None)
        await yours.sources.look()
        await yours.refuses(secret, AccessReason.INVALID_CREDENTIAL)


async def test_a_store_that_forgot_is_reminded_of_keys_and_of_revocations(tmp_path: Path) -> None:
    with RedisProcess(tmp_path) as redis:
        async with two_doors(redis, "forgot") as (one, other, _):
            _, kept = await one.sources.create("kept", "", INFERENCE, None)
            revoked, gone = await one.sources.create("gone", "", INFERENCE, None)
            await one.sources.revoke(revoked.fingerprint)
            redis.kill()
            await one.sources.look()
            await one.admit(kept)  # an outage locks nobody out
            await one.refuses(gone, AccessReason.KEY_REVOKED)
            with pytest.raises(StoreUnavailable):
                await one.sources.create("new", "", INFERENCE, None)
            redis.start()
            await one.sources.look()
            await other.sources.look()
            for door in (one, other):
                await door.admit(kept)
                await door.refuses(gone, AccessReason.KEY_REVOKED)
            fresh = Door(RedisStore(redis.url, deadline_s=5.0), "forgot")
            await fresh.sources.load()
            await fresh.admit(kept)
            await fresh.refuses(gone, AccessReason.KEY_REVOKED)
            await fresh.store.close()


async def test_a_revocation_that_could_not_be_told_is_told_by_the_next_attempt() -> None:
    store = MemoryStore()
    one, other = Door(store), Door(store)
    key, secret = await one.sources.create("ann", "", INFERENCE, None)
    await other.sources.look()
    put = store.put

    async def fail(key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        if key.endswith("changed"):
            raise StoreUnavailable("away")
        await put(key, value, ttl_s=ttl_s)

    with mock.patch.object(store, "put", fail), pytest.raises(StoreUnavailable):
        await one.sources.revoke(key.fingerprint)
    assert (await one.sources.revoke(key.fingerprint))[1].revoked_at == NOW
    for door in (one, other):
        await door.sources.look()
        await door.refuses(secret, AccessReason.KEY_REVOKED)


@pytest.mark.parametrize("first", ["who knows the revocation", "who does not", "who makes a new key"])
async def test_no_key_comes_back_to_life_whoever_reminds_the_store_first(first: str) -> None:
    store = MemoryStore()
    one, other = Door(store), Door(store)
    _, kept = await one.sources.create("kept", "", INFERENCE, None)
    key, gone = await one.sources.create("gone", "", INFERENCE, None)
    await other.sources.look()
    await one.sources.revoke(key.fingerprint)  # which `other` has not heard of
    for name in await store.scan(""):
        await store.delete(name)
    match first:
        case "who makes a new key":
            await other.sources.create("new", "", INFERENCE, None)
        case "who does not":
            await other.sources.look()
    for door in (one, other, one):
        await door.sources.look()
    fresh = Door(store)
    await fresh.sources.load()
    for door in (one, other, fresh):
        await door.admit(kept)
        await door.refuses(gone, AccessReason.KEY_REVOKED)


async def test_keys_are_read_at_first_whatever_else_the_store_lost(redis: RedisProcess) -> None:
    async with two_doors(redis, "evicted") as (one, _, store):
        _, secret = await one.sources.create("ann", "", INFERENCE, None)
        await store.delete("tandem:evicted:access:changed")
        fresh = Door(store, "evicted")
        await fresh.sources.load()
        await fresh.admit(secret)


async def test_rubbish_in_the_store_is_passed_over(redis: RedisProcess) -> None:
    async with two_doors(redis, "rubbish") as (one, other, store):
        prefix = "tandem:rubbish:access:key:"
        key, secret = await one.sources.create("ann", "", INFERENCE, None)
        await store.put(prefix + "0" * 12, b"\xff{")
        promoted = key.model_copy(update={"roles": frozenset(Role)})
        await store.put(prefix + "f" * 12, promoted.model_dump_json().encode())  # under another key's name
        await store.put("tandem:rubbish:access:changed", b"now")
        await other.sources.look()
        assert (await other.admit(secret)).roles == INFERENCE
        assert await other.names() == [("shared", "ann")]


async def test_a_key_of_the_configuration_can_be_revoked_too(redis: RedisProcess) -> None:
    secret = new_key()
    key = checked_key("ann", "acme", INFERENCE, secret, NOW, None)
    store = RedisStore(redis.url, deadline_s=5.0)
    one, other = (Door(store, "config", keys=[key]) for _ in range(2))
    await one.admit(secret)
    assert await one.sources.revoke(key.fingerprint) == ("config", key.model_copy(update={"revoked_at": NOW}))
    await one.refuses(secret, AccessReason.KEY_REVOKED)
    await other.sources.look()
    await other.refuses(secret, AccessReason.KEY_REVOKED)
    assert await other.names() == [("config", "ann")]
    await store.close()


async def test_what_cannot_be_made_or_revoked_is_said(redis: RedisProcess) -> None:
    async with two_doors(redis, "bad") as (one, _, store):
        for name, tenant, lifetime_s, field in (
            ("", "", 1.0, "name"),
            ("a", "b c", 1.0, "tenant"),
            ("a", "", 0.0, "lifetime_s"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await one.sources.create(name, tenant, INFERENCE, lifetime_s)
            assert caught.value.field == field
        for fingerprint in ("", "nobody", "0" * 12, "*"):
            with pytest.raises(InvalidRequest, match="no API key has it"):
                await one.sources.revoke(fingerprint)
        assert await store.scan("tandem:bad:access:") == {}
    for more in ("enabled", "shared_keys"):
        settings: dict[str, Any] = {more: False}
        with pytest.raises(ConfigError):
            await Door(MemoryStore(), **settings).sources.create("ann", "", INFERENCE, None)


async def test_a_file_of_keys_is_followed(tmp_path: Path) -> None:
    path, ann, bob = tmp_path / "keys.yaml", new_key(), new_key()
    keys = [checked_key(name, "acme", INFERENCE, key, NOW, 60.0) for name, key in (("ann", ann), ("bob", bob))]
    write_keys(path, tuple(keys[:1]))
    door = Door(MemoryStore(), keys_file=path, shared_keys=False)
    await door.sources.load()
    assert await door.admit(ann) == Principal("ann", "acme", INFERENCE)
    await door.refuses(bob, AccessReason.INVALID_CREDENTIAL)
    write_keys(path, tuple(keys))
    await door.sources.look()
    await door.admit(bob)
    for broken in ("keys: [", "keys: 1", "other: []", "keys: [{name: ann}]", "keys: [{name: a, sha256: tnd-x}]"):
        path.write_text(broken)
        await door.sources.look()
        await door.admit(ann)  # what cannot be read locks nobody out
    path.unlink()
    await door.sources.look()
    await door.admit(ann)
    write_keys(path, (keys[0].model_copy(update={"revoked_at": NOW}),))
    await door.sources.look()
    await door.refuses(ann, AccessReason.KEY_REVOKED)
    await door.refuses(bob, AccessReason.INVALID_CREDENTIAL)
    assert await door.names() == [("file", "ann")]


async def test_a_gateway_does_not_start_with_half_its_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        await Door(MemoryStore(), keys_file=tmp_path / "none.yaml").sources.load()


async def test_a_store_that_is_away_at_the_start_is_asked_again() -> None:
    store = MemoryStore()
    first = Door(store)
    _, secret = await first.sources.create("ann", "", INFERENCE, None)
    store.set_available(False)
    late = Door(store)
    await late.sources.load()
    await late.refuses(secret, AccessReason.INVALID_CREDENTIAL)
    store.set_available(True)
    await late.sources.look()
    await late.admit(secret)


async def test_changes_are_looked_for_all_the_time(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_doors(redis, "run") as (one, other, _):
        heard = asyncio.Event()
        replace = other.gatekeeper.replace_ring

        def replace_and_tell(source: str, ring: KeyRing) -> None:
            replace(source, ring)
            heard.set()

        monkeypatch.setattr(other.gatekeeper, "replace_ring", replace_and_tell)
        running = asyncio.create_task(other.sources.run())
        _, secret = await one.sources.create("ann", "", INFERENCE, None)
        async with asyncio.timeout(10):
            await heard.wait()
        await other.admit(secret)
        running.cancel()
        await asyncio.wait([running])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    assert read_keys(path) == ()
    keys = (
        checked_key("ann", "acme", frozenset(Role), new_key(), NOW, None),
        checked_key("bob", "", INFERENCE, new_key(), NOW, 5.0).model_copy(
            update={"revoked_at": NOW + timedelta(seconds=1)}
        ),
    )
    write_keys(path, keys)
    assert read_keys(path) == keys
    assert [one.name for one in tmp_path.iterdir()] == ["keys.yaml"]
