"""HTTP to a gateway in tests: a client with a deadline, raw sockets, and server-sent events read back."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.fakes.cluster import FakeCluster
from tests.fakes.script import PATIENCE_S

DONE = "[DONE]"
CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 5}
TEXT = {"prompt": "hello", "temperature": 0, "max_tokens": 5}


@asynccontextmanager
async def http_client(cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{cluster.gateway.http_address}"
    async with httpx.AsyncClient(base_url=base, timeout=PATIENCE_S, trust_env=False) as client:
        yield client


def events_of(text: str) -> list[Any]:
    """Return what a stream said, `[DONE]` as it is. Every event is one line of data."""
    assert text.endswith("\n\n")
    blocks = text[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    said = [block.removeprefix("data: ") for block in blocks]
    return [one if one == DONE else json.loads(one) for one in said]


class RawConnection:
    """A socket of our own, to say what no client says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, path: str, body: bytes, *headers: str) -> None:
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
        if not any(line.startswith(("content-length", "transfer-encoding")) for line in headers):
            lines.append(f"content-length: {len(body)}")
        self.say("\r\n".join([*lines, "", ""]).encode() + body)

    async def read_until(self, wanted: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(wanted)

    async def read_to_end(self) -> bytes:
        """Read until the server closes."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self._reader.read()
            except ConnectionResetError:
                return b""

    async def answer(self) -> tuple[int, Any]:
        """Read one whole response that says its length."""
        head = (await self.read_until(b"\r\n\r\n")).decode()
        length = next(line for line in head.lower().split("\r\n") if line.startswith("content-length"))
        async with asyncio.timeout(PATIENCE_S):
            body = await self._reader.readexactly(int(length.partition(":")[2]))
        return int(head.split()[1]), json.loads(body)


@asynccontextmanager
async def raw_connection(cluster: FakeCluster, *, receive_buffer: int = 0) -> AsyncIterator[RawConnection]:
    """Connect; with a small `receive_buffer`, what is not read soon blocks the sender."""
    host, _, port = cluster.gateway.http_address.rpartition(":")
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=2**16)
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.transport.abort()
