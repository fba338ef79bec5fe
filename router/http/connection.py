"""One HTTP connection, held to bounds that uvicorn leaves open: how long a request's head and body may take and how
large the head may grow, how long a client may leave an answer unread, how many connections there may be.

Life of a connection: opened -> head -> body -> answer -> idle -> head -> ...
- opened, head: `header_timeout_s`; then it is told (408, once it sent something) and closed. Above `max_header_bytes`:
  431.
- body: `body_timeout_s`, likewise.
- answer: none, but a client whose unread bytes fill the transport's buffer for `write_timeout_s` is cut off.
- idle: uvicorn's keep-alive timer.
One timer at a time; writing has its own. What arrives after a refusal is not read."""

import asyncio
import json
import logging
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from router.http.config import HttpConfig
from router.http.errors import error_object

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ConnectionBounds:
    """What holds for every connection of a server, and what they tell it: `one_closed` is set by each that ended."""

    http: HttpConfig
    write_timeout_s: float
    one_closed: asyncio.Event
    are_closing: bool = False


class _Reading(StrEnum):
    IDLE = "idle"  # between requests; an answer may be under way
    HEAD = "head"
    BODY = "body"


class BoundedConnection(HttpToolsProtocol):
    """Uvicorn's protocol with deadlines.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        bounds: ConnectionBounds,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = bounds
        self._reading = _Reading.IDLE
        self._raw_head_bytes = 0  # of whole reads within a head
        self._parsed_head_bytes = 0  # of what the parser handed over; trailers after a body count too
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._certificate_names: tuple[str, ...] = ()

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._bounds.are_closing:  # it was accepted while the port was being closed
            transport.abort()
            return
        self._certificate_names = _certificate_names(transport)
        if len(self.connections) > self._bounds.http.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
        else:
            self._arm(self._bounds.http.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)
        self._bounds.one_closed.set()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._reading is _Reading.IDLE and self._deadline is None:
            self._arm(self._bounds.http.header_timeout_s)  # even before the parser calls it a request
        was_in_head = self._reading is _Reading.HEAD
        super().data_received(data)
        if was_in_head and self._reading is _Reading.HEAD:
            self._raw_head_bytes += len(data)  # what the parser keeps of a header that has not ended it shows nobody
            self._bound_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._bounds.write_timeout_s, self._cut_off)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["certificate_names"] = self._certificate_names
        self._reading = _Reading.HEAD
        self._raw_head_bytes = self._parsed_head_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._parsed_head_bytes += len(url)
        self._bound_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._parsed_head_bytes += len(name) + len(value) + 4
        self._bound_head()

    def on_headers_complete(self) -> None:
        self._reading = _Reading.BODY
        self._disarm()
        if self._is_refused:
            return
        self._arm(self._bounds.http.body_timeout_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading = _Reading.IDLE
        self._disarm()
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "this is not a valid HTTP request")

    # Bounds.

    def _bound_head(self) -> None:
        limit = self._bounds.http.max_header_bytes
        if max(self._raw_head_bytes, self._parsed_head_bytes) > limit:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers have more than {limit} bytes")

    def _arm(self, timeout_s: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(timeout_s, self._overdue)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _overdue(self) -> None:
        self._deadline = None
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn's own annotation leaves the None out
        if self._reading is _Reading.IDLE and cycle is None:
            self.transport.close()  # it never said a word
        elif self._reading is _Reading.BODY or cycle is None or cycle.response_complete:
            what = "body" if self._reading is _Reading.BODY else "head"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's {what} did not arrive in time")
        else:
            # The beginning of a next request, or a stray line break, must not end the answer that is under way.
            self._arm(self._bounds.http.header_timeout_s)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Say so, unless an answer has begun that this would fall into, and close."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._disarm()
        cycle: RequestResponseCycle | None = self.cycle
        is_answered = cycle is not None and (cycle.response_started and not cycle.response_complete)
        if self._reading is _Reading.BODY:  # of the request that the cycle is for: it may have been refused already
            is_answered = cycle is not None and cycle.response_started
        if not is_answered:
            body = json.dumps(error_object(status, message)).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _cut_off(self) -> None:
        self._unread = None
        _log.info("a client that read nothing for %g s was cut off", self._bounds.write_timeout_s)
        self.transport.abort()


def _certificate_names(transport: asyncio.BaseTransport) -> tuple[str, ...]:
    """The alternative and common names in the certificate of the client, which TLS has verified."""
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert() if tls is not None else None
    if not certificate:
        return ()
    alternative = [value for _, value in certificate.get("subjectAltName", ())]
    subject = [value for names in certificate.get("subject", ()) for name, value in names if name == "commonName"]
    return (*alternative, *subject)
