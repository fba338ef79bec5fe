"""TLS between real processes' parts: who is believed, who is not, and certificates that are replaced under way."""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from core import rpc, tls
from core.errors import ConfigError
from core.tls import ClientTls, PeerTls, ServerTls
from tests.certificates import Authority, Issued

HELLO = b"hello\n"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "stranger")


@pytest.fixture(autouse=True)
def _look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_LOOK_AGAIN_S", 0.0)


@asynccontextmanager
async def grpc_server(config: ServerTls | None) -> AsyncIterator[str]:
    server = rpc.create_server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = rpc.bind(server, "127.0.0.1", 0, config)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def ask(channel: grpc.aio.Channel) -> bool:
    """Say whether the server answers; False: no connection could be made."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        raise
    return True


async def reaches(address: str, config: ClientTls | None) -> bool:
    async with rpc.connect(address, config) as channel:
        return await ask(channel)


def shown(issued: Issued, **more: Path) -> ServerTls:
    return ServerTls(certificate=issued.certificate, private_key=issued.private_key, **more)


def client(ca: Authority, issued: Issued | None = None, server_name: str = "") -> ClientTls:
    if issued is None:
        return ClientTls(ca=ca.ca, server_name=server_name)
    return ClientTls(ca=ca.ca, certificate=issued.certificate, private_key=issued.private_key, server_name=server_name)


async def test_a_client_believes_only_its_own_authority_and_the_right_name(
    authority: Authority, stranger: Authority
) -> None:
    async with grpc_server(shown(authority.issue("gateway"))) as address:
        assert await reaches(address, client(authority))
        assert not await reaches(address, client(stranger))
        assert not await reaches(address, None)  # without TLS nothing is answered
        assert not await reaches(address, client(authority, server_name="elsewhere.example"))
        two = ",".join([address, address])
        assert await reaches(two, client(authority))
    async with grpc_server(shown(authority.issue("named", ["tandem.internal"]))) as address:
        assert await reaches(address, client(authority, server_name="tandem.internal"))
        assert not await reaches(address, client(authority))
    async with grpc_server(shown(authority.issue("old", days_left=-1))) as address:
        assert not await reaches(address, client(authority))


async def test_a_server_that_asks_for_certificates_takes_only_its_authority_s(
    authority: Authority, stranger: Authority
) -> None:
    config = shown(authority.issue("gateway"), client_ca=authority.ca)
    async with grpc_server(config) as address:
        assert await reaches(address, client(authority, authority.issue("worker")))
        assert not await reaches(address, client(authority))
        assert not await reaches(address, client(authority, stranger.issue("worker")))
        assert not await reaches(address, client(authority, authority.issue("late", days_left=-1)))


@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_far_server_is_reached_at_the_first_attempt(is_tls: bool, authority: Authority) -> None:
    config = shown(authority.issue("gateway")) if is_tls else None
    async with grpc_server(config) as address, far_away(address, one_way_s=0.1) as door:
        assert await reaches(door, client(authority) if is_tls else None)


@asynccontextmanager
async def far_away(address: str, one_way_s: float) -> AsyncIterator[str]:
    """Yield an address at which everything takes so long to get to `address`."""
    host, port = address.split(":")
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            loop.call_later(one_way_s, writer.write, data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        writers.extend([writer, there_writer])
        pairs = ((reader, there_writer), (there_reader, writer))
        tasks.update(asyncio.create_task(copy(*pair)) for pair in pairs)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        await server.wait_closed()


async def test_several_hosts_behind_tls_need_one_name(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="one server name for all"):
        rpc.connect("127.0.0.1:1,127.0.0.2:1", client(authority))


async def test_a_server_s_new_certificate_is_shown_to_the_next_connection(
    authority: Authority, stranger: Authority
) -> None:
    issued = authority.issue("gateway")
    async with grpc_server(shown(issued)) as address, rpc.connect(address, client(authority)) as channel:
        assert await ask(channel)
        stranger.issue("gateway", into=issued)
        assert not await reaches(address, client(authority))
        assert await reaches(address, client(stranger))
        assert await ask(channel)  # what is connected stays so
        issued.private_key.write_bytes(b"half written")
        assert await reaches(address, client(stranger))  # the old pair stays in force
        authority.issue("gateway", into=issued)
        assert await reaches(address, client(authority))


async def test_a_server_s_new_authority_for_clients_counts_for_the_next_connection(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    ca = tmp_path / "clients.pem"
    ca.write_bytes(authority.ca.read_bytes())
    config = shown(authority.issue("gateway"), client_ca=ca)
    ours, theirs = authority.issue("worker"), stranger.issue("worker")
    async with grpc_server(config) as address, socket_server(config) as port:
        assert await reaches(address, client(authority, ours))
        assert not await reaches(address, client(authority, theirs))
        ca.write_bytes(stranger.ca.read_bytes())
        assert await reaches(address, client(authority, theirs))
        assert not await reaches(address, client(authority, ours))
        assert await greeted(port, authority.ca, theirs)
        assert not await greeted(port, authority.ca, ours)


async def test_a_line_shows_its_new_certificate_once_renewed(authority: Authority, stranger: Authority) -> None:
    mine = stranger.issue("worker")
    config = shown(authority.issue("gateway"), client_ca=authority.ca)
    async with grpc_server(config) as address:
        line = rpc.Line(address, client(authority, mine))
        await line.renew()
        assert not await ask(line.channel)
        unchanged = line.channel
        await line.renew()
        assert line.channel is unchanged
        authority.issue("worker", into=mine)
        await line.renew()
        assert await ask(line.channel)
        await line.close()


async def test_peers_show_one_certificate_both_ways(authority: Authority) -> None:
    issued = authority.issue("peer", ["tandem.internal"])
    peer = PeerTls(
        certificate=issued.certificate,
        private_key=issued.private_key,
        ca=authority.ca,
        server_name="tandem.internal",
    )
    async with grpc_server(peer.server) as address:
        assert await reaches(address, peer.client)
        assert not await reaches(address, client(authority, server_name="tandem.internal"))


@asynccontextmanager
async def socket_server(config: ServerTls) -> AsyncIterator[int]:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=tls.server_context(config))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


def trusting(ca: Path, highest: ssl.TLSVersion | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    if highest is not None:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or the client itself would not speak it
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = highest
    return context


async def spoken(port: int, ca: Path, highest: ssl.TLSVersion) -> str | None:
    """Return the version that a connection speaks; None: there is no connection."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(ca, highest))
    except OSError:
        return None
    connection = writer.get_extra_info("ssl_object")
    writer.transport.abort()
    return str(connection.version())


async def greeted(port: int, ca: Path, issued: Issued | None = None, highest: ssl.TLSVersion | None = None) -> bool:
    context = trusting(ca, highest)
    if issued is not None:
        context.load_cert_chain(issued.certificate, issued.private_key)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except OSError:
        return False
    try:
        return await reader.read() == HELLO
    except OSError:  # TLS 1.3: the client learns only now that it is refused
        return False
    finally:
        writer.transport.abort()


async def test_sockets_of_our_own_are_as_strict_and_follow_the_files(authority: Authority, stranger: Authority) -> None:
    issued = authority.issue("gateway")
    async with socket_server(shown(issued)) as port:
        assert await greeted(port, authority.ca)
        assert not await greeted(port, stranger.ca)
        stranger.issue("gateway", into=issued)
        assert await greeted(port, stranger.ca)
        assert not await greeted(port, authority.ca)
    config = shown(authority.issue("gateway"), client_ca=authority.ca)
    async with socket_server(config) as port:
        assert await greeted(port, authority.ca, authority.issue("client"))
        assert not await greeted(port, authority.ca)
        assert not await greeted(port, authority.ca, stranger.issue("client"))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_nothing_below_tls_1_2_is_spoken(authority: Authority) -> None:
    config = shown(authority.issue("gateway"))
    async with socket_server(config) as port:
        assert not await greeted(port, authority.ca, highest=ssl.TLSVersion.TLSv1_1)
        assert await greeted(port, authority.ca, highest=ssl.TLSVersion.TLSv1_2)
    async with grpc_server(config) as address:
        port = int(address.rpartition(":")[2])
        assert await spoken(port, authority.ca, ssl.TLSVersion.TLSv1_1) is None
        assert await spoken(port, authority.ca, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    for config, problem in (
        (ServerTls(certificate=one.certificate, private_key=other.private_key), "cannot be used together"),
        (ServerTls(certificate=tmp_path / "none.pem", private_key=one.private_key), "none.pem: cannot read"),
        (shown(one, client_ca=one.private_key), "no certificate authority"),
    ):
        with pytest.raises(ConfigError, match=problem):
            tls.Pem.of_server(config)
    with pytest.raises(ConfigError, match="no certificate authority"):
        rpc.connect("127.0.0.1:1", ClientTls(ca=one.private_key))


def test_files_are_looked_at_once_in_a_while(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_LOOK_AGAIN_S", 3600.0)
    issued = authority.issue("gateway")
    pem = tls.Pem.of_server(shown(issued))
    before = pem.current()
    authority.issue("gateway", into=issued)
    os.utime(issued.certificate, (time.time() + 5, time.time() + 5))
    assert pem.current() is not before
    assert pem.current() == before


def visit(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession | None]:
    """Connect as a client that resumes a session when it can. Returns what it heard, and its new session."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10.0) as bare,
            context.wrap_socket(bare, server_hostname="127.0.0.1", session=session) as connection,
        ):
            return connection.recv(len(HELLO)), connection.session
    except ssl.SSLError:
        return b"", None


@pytest.mark.parametrize("highest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_session_outlives_the_trust_in_its_certificate(
    authority: Authority, stranger: Authority, tmp_path: Path, highest: ssl.TLSVersion
) -> None:
    """TLS 1.2 is not spoken with those who show one."""
    issued, believed = authority.issue("client"), tmp_path / "believed.pem"
    believed.write_bytes(authority.ca.read_bytes())
    context = trusting(authority.ca, highest)
    context.load_cert_chain(issued.certificate, issued.private_key)
    async with socket_server(shown(authority.issue("server"), client_ca=believed)) as port:
        heard, session = await asyncio.to_thread(visit, port, context, None)
        assert heard == (HELLO if highest is ssl.TLSVersion.TLSv1_3 else b"")
        believed.write_bytes(stranger.ca.read_bytes())
        heard, _ = await asyncio.to_thread(visit, port, context, session)
        assert not heard
