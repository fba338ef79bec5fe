"""Uvicorn's protocol inside the gateway's own event loop, on a socket of ours, under the gateway's own drain.

Uvicorn's own server is left out: it looks after signals and a life cycle that are the gateway's, and it looks around
for the end ten times a second. The port is taken when the server is made, before anything else of the gateway starts,
so that a taken one is an error at once. While the gateway drains the port stays open: probes are told 503, open
streams finish. A port that is shared is left first, so that new connections go to those who share it."""

import asyncio
import contextlib
import socket
import time
from email.utils import formatdate

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from core.errors import ConfigError
from core.tls import ServerTls, server_context
from router.http.config import HttpConfig
from router.http.connection import BoundedConnection, ConnectionBounds

_BACKLOG = 2048
_SEND_BUFFER_BYTES = 128 * 2**10  # Linux takes twice as much
_CLOSE_GRACE_S = 1.0  # for answers whose requests are all over by then
_DATE_PERIOD_S = 1.0


class HttpServer:
    """The HTTP server of one gateway."""

    def __init__(
        self,
        config: HttpConfig,
        *,
        host: str,
        port: int,
        tls: ServerTls | None,
        write_timeout_s: float,
        share_port: bool = False,
    ) -> None:
        """Take the port (0: a free one) and listen; nobody is answered before `start`.

        Raises:
            ConfigError: the address is in use or not ours, or a certificate cannot be used.
        """
        self._bounds = ConnectionBounds(config, write_timeout_s, asyncio.Event())
        self._tls = None if tls is None else server_context(tls)
        self._socket = _listen(host, port, share_port=share_port)
        self.port = int(self._socket.getsockname()[1])
        self._state = ServerState()
        self._listener: asyncio.Server | None = None
        self._dating: asyncio.TimerHandle | None = None

    async def start(self, app: FastAPI) -> None:
        """Answer from now on."""
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=self._bounds.http.keep_alive_s,  # type: ignore[arg-type]  # a delay; fractions are fine
        )
        config.load()
        self._tell_date()
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: BoundedConnection(self._bounds, config, self._state, {}),
            sock=self._socket,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else self._bounds.http.header_timeout_s,
            backlog=_BACKLOG,
        )

    def leave_port(self) -> None:
        """Close the port, and every connection as soon as its answer, if there is one, is written. Idempotent."""
        if self._listener is None:
            self._socket.close()
            return
        self._listener.close()
        self._bounds.are_closing = True
        for connection in list(self._state.connections):
            connection.shutdown()

    async def stop(self) -> None:
        """Close the port, then all connections; answers that are still being written get a moment."""
        if self._dating is not None:
            self._dating.cancel()
        self.leave_port()
        if self._listener is None:
            return
        state, deadline = self._state, asyncio.get_running_loop().time() + _CLOSE_GRACE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while state.connections:
                    self._bounds.one_closed.clear()
                    await self._bounds.one_closed.wait()
        for connection in list(state.connections):
            connection.transport.abort()  # its client does not read
        if tasks := list(state.tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await self._listener.wait_closed()

    def _tell_date(self) -> None:
        """Renew the header that all responses share."""
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        self._dating = asyncio.get_running_loop().call_later(_DATE_PERIOD_S, self._tell_date)


def _listen(host: str, port: int, *, share_port: bool) -> socket.socket:
    """Return a listening socket. Raises: ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"http: cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no listener
        # Connections inherit these: a peer that went without a word is noticed within half a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Left alone, the kernel keeps megabytes for a client that reads slowly.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"http: cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener
