"""A TCP proxy that drops its connections, or falls silent, when told to: a network that breaks, as both ends see it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TcpProxy:
    """Stands before one server.

    Args:
        address: host:port of the server.
    """

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.num_connections = 0
        self.is_silent = False  # what is sent from then on arrives nowhere, and neither end is told

    @property
    def address(self) -> str:
        assert self._server is not None, "not started"
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)

    def drop(self) -> None:
        """Reset every connection that there is; new ones are let in."""
        for pair in list(self._pairs):
            for writer in pair:
                writer.transport.abort()

    async def stop(self) -> None:
        """Drop all, and let nobody in any more."""
        if self._server is not None:
            self._server.close()
        self.drop()
        for task in list(self._pumps):
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            behind_reader, behind_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, behind_writer)
        self._pairs.add(pair)
        tasks = [
            asyncio.create_task(self._pump(reader, behind_writer)),
            asyncio.create_task(self._pump(behind_reader, writer)),
        ]
        self._pumps.update(tasks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in pair:
                end.transport.abort()
            self._pairs.discard(pair)
            await asyncio.gather(*tasks, return_exceptions=True)
            self._pumps.difference_update(tasks)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not self.is_silent:
                    writer.write(data)
                    await writer.drain()


@asynccontextmanager
async def tcp_proxy(address: str) -> AsyncIterator[TcpProxy]:
    """Stand before a server for a while."""
    proxy = TcpProxy(address)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
