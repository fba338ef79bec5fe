"""The store over TLS: a real Redis behind a door that speaks it (the server that tests have does not)."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from core.errors import ConfigError, StoreUnavailable
from core.store_redis import RedisStore
from core.tls import ClientTls, ServerTls, server_context
from tests.certificates import Authority, Issued
from tests.redis_process import RedisProcess


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def tls_door(redis: RedisProcess, context: ssl.SSLContext) -> AsyncIterator[str]:
    """Yield the URL of a door in front of Redis."""
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(redis.url.removeprefix("unix://"))
        writers.extend([writer, inner_writer])
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            if not writer.is_closing():
                writer.transport.abort()
        await server.wait_closed()


async def answers(url: str, tls: ClientTls | None) -> bool:
    store = RedisStore(url, deadline_s=5.0, tls=tls)
    try:
        await store.put("k", b"v")
        return await store.get("k") == b"v"
    except StoreUnavailable:
        return False
    finally:
        await store.close()


def client(authority: Authority, issued: Issued | None = None) -> ClientTls:
    if issued is None:
        return ClientTls(ca=authority.ca)
    return ClientTls(ca=authority.ca, certificate=issued.certificate, private_key=issued.private_key)


async def test_redis_is_believed_by_its_authority_and_asks_for_ours(redis: RedisProcess, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    issued = authority.issue("redis")
    shown = ServerTls(certificate=issued.certificate, private_key=issued.private_key)
    async with tls_door(redis, server_context(shown)) as url:
        assert await answers(url, client(authority))
        assert not await answers(url, client(stranger))
        assert not await answers(url, None)  # the system does not know this authority
        assert not await answers(url.replace("rediss", "redis"), None)
        assert await answers(f"{url}?ssl_ca_certs={authority.ca}", None)
    asking = shown.model_copy(update={"client_ca": authority.ca})
    async with tls_door(redis, server_context(asking)) as url:
        assert await answers(url, client(authority, authority.issue("gateway")))
        assert not await answers(url, client(authority))


async def test_a_certificate_for_another_host_is_refused(redis: RedisProcess, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue("redis", ["redis.example"])
    shown = ServerTls(certificate=issued.certificate, private_key=issued.private_key)
    async with tls_door(redis, server_context(shown)) as url:
        assert not await answers(url, client(authority))


def test_what_cannot_work_is_told_at_once(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for url, tls, problem in (
        ("redis://127.0.0.1:1", ClientTls(ca=authority.ca), "must begin with rediss"),
        ("rediss://127.0.0.1:1", ClientTls(ca=tmp_path / "none.pem"), "no certificate authority"),
        ("rediss://127.0.0.1:1", ClientTls(ca=authority.ca, server_name="redis"), "known by the host"),
    ):
        with pytest.raises(ConfigError, match=problem):
            RedisStore(url, tls=tls)
