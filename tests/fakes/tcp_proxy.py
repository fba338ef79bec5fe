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
        self._joined: set[asyncio.Task[None]] = set()
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
        for _ in range(3):  # connections that were accepted, and whose tasks begin in the next turns of the loop
            await asyncio.sleep(0)
        for task in list(self._joined):
            task.cancel()
        await asyncio.gather(*self._joined, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._joined.add(task)
        try:
            behind_reader, behind_writer = await asyncio.open_connection(self._host, self._port)
            pair = (writer, behind_writer)
            self._pairs.add(pair)
            pumps = (self._pump(reader, behind_writer), self._pump(behind_reader, writer))
            tasks = [asyncio.create_task(pump) for pump in pumps]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._pairs.discard(pair)
                for pump in tasks:
                    pump.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await _abort(behind_writer)
        except (OSError, asyncio.CancelledError):
            pass  # nobody is there, or the end of the test
        finally:
            await _abort(writer)
            self._joined.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not self.is_silent:
                    writer.write(data)
                    await writer.drain()


async def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def tcp_proxy(address: str) -> AsyncIterator[TcpProxy]:
    """Stand before a server for a while."""
    proxy = TcpProxy(address)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
