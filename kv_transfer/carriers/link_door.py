"""Where the ends of links meet over sockets: the receiver keeps a door open, senders knock with the link's name.

A sender connects and says its hello: magic, the link's name, and a keyed hash of carrier and name under the token that
it was told on the control stream. The receiver answers with a keyed hash of its own, so that both know whom they met
and the token itself never crosses the wire. A name is met once, so there is nothing to replay.

What connects and is not a peer (a port scanner, a stale sender, a process that says nothing) costs one of a bounded
number of waiting places until a deadline, and holds up nobody: every connection at the door is read without blocking.
When all places are taken, the oldest stranger goes.

There is no thread of the door's own. Whoever waits in `meet` attends it, one at a time, for everybody: arrivals for
others are laid aside and they are woken. While nobody waits, the kernel keeps who comes in its queue.
"""

import contextlib
import hmac
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass

from kv_transfer.link import LinkError

MAX_NAME_BYTES = 1024
_MAGIC = b"TDKL\x01"
_PREFIX = struct.Struct("<5sH")  # magic and version, length of the name
_MAC_BYTES = 32
_MAX_VISITORS = 64
_HELLO_TIMEOUT_S = 5.0
_KEPT_S = 30.0  # an arrival that nobody asks for
_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sender that knew the token: its connection, blocking, and the carrier of the door that it came through."""

    carrier: str
    connection: socket.socket


@dataclass(slots=True, eq=False)
class _Visitor:
    carrier: str
    connection: socket.socket
    expires_at: float
    said: bytearray


class Door:
    """Listening sockets of one receiver, one per carrier. Any number of threads may meet at it."""

    def __init__(self, listeners: dict[str, socket.socket], token: bytes) -> None:
        """Takes over the sockets, which are bound."""
        self._token = token
        self._changed = threading.Condition()
        self._is_attended = False
        self._is_closed = False
        self._arrived: dict[str, tuple[Arrival, float]] = {}
        self._visitors: list[_Visitor] = []
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        for carrier, listener in listeners.items():
            listener.setblocking(False)
            listener.listen(_BACKLOG)
            self._selector.register(listener, selectors.EVENT_READ, carrier)
        self._alarm, self._bell = socket.socketpair()
        self._selector.register(self._alarm, selectors.EVENT_READ, None)

    def meet(self, name: str, timeout_s: float) -> Arrival:
        """Wait for the sender of a link. The caller owns the connection, and answers it with `answer`.

        Raises:
            LinkError: it did not come in time, or the door was closed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: name in self._arrived or self._is_closed or not self._is_attended,
                    max(0.0, deadline - time.monotonic()),
                )
                if name in self._arrived:
                    return self._arrived.pop(name)[0]
                if self._is_closed:
                    raise LinkError("the door was closed")
                if time.monotonic() >= deadline:
                    raise LinkError(f"{name}: nobody came within {timeout_s:g} s")
                if self._is_attended:
                    continue
                self._is_attended = True
            try:
                self._attend(deadline)
            finally:
                self._leave()

    def close(self) -> None:
        """Turn everybody away. Links that have met stay."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
            self._bell.send(b"!")  # whoever attends frees everything on the way out
            if not self._is_attended:
                self._free()

    def _leave(self) -> None:
        with self._changed:
            self._is_attended = False
            self._changed.notify_all()
            if self._is_closed:
                self._free()

    def _free(self) -> None:
        self._selector.close()
        for connection in (*self._listeners.values(), self._alarm, self._bell):
            connection.close()
        for visitor in self._visitors:
            visitor.connection.close()
        for arrival, _ in self._arrived.values():
            arrival.connection.close()
        self._visitors.clear()
        self._arrived.clear()

    # --- the attendant ------------------------------------------------------------------------------------------------

    def _attend(self, deadline: float) -> None:
        """Serve the door until something arrived, or the deadline."""
        now = time.monotonic()
        expiries = [visitor.expires_at for visitor in self._visitors]
        for key, _ in self._selector.select(max(0.0, min([deadline, *expiries]) - now)):
            if isinstance(key.data, str):
                assert isinstance(key.fileobj, socket.socket)
                self._let_in(key.fileobj, key.data)
            elif key.data in self._visitors:  # not turned away since `select`, for somebody who came just now
                self._listen_to(key.data)
        now = time.monotonic()
        for visitor in [visitor for visitor in self._visitors if visitor.expires_at <= now]:
            self._turn_away(visitor)
        with self._changed:
            for name in [name for name, (_, kept_until) in self._arrived.items() if kept_until <= now]:
                self._arrived.pop(name)[0].connection.close()

    def _let_in(self, listener: socket.socket, carrier: str) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # gone again, or out of descriptors: whoever it was tries again
            return
        connection.setblocking(False)
        if len(self._visitors) >= _MAX_VISITORS:
            self._turn_away(self._visitors[0])
        visitor = _Visitor(carrier, connection, time.monotonic() + _HELLO_TIMEOUT_S, bytearray())
        self._visitors.append(visitor)
        self._selector.register(connection, selectors.EVENT_READ, visitor)

    def _listen_to(self, visitor: _Visitor) -> None:
        """Read what is still missing of a hello, never more: what follows belongs to the link."""
        try:
            said = visitor.connection.recv(_missing(visitor.said))
        except BlockingIOError:
            return
        except OSError:
            said = b""
        visitor.said += said
        try:
            missing = _missing(visitor.said)
        except ValueError:
            said = b""
        if not said:
            self._turn_away(visitor)
        elif not missing:
            self._judge(visitor)

    def _judge(self, visitor: _Visitor) -> None:
        name, mac = bytes(visitor.said[_PREFIX.size : -_MAC_BYTES]), bytes(visitor.said[-_MAC_BYTES:])
        is_peer = hmac.compare_digest(mac, _mac(self._token, b"sender", visitor.carrier, name))
        with self._changed:
            # Whoever comes second under a name is not the peer, whatever it knows.
            if not is_peer or name.decode(errors="replace") in self._arrived:
                self._turn_away(visitor)
                return
            self._forget(visitor)
            visitor.connection.setblocking(True)
            arrival = Arrival(visitor.carrier, visitor.connection)
            self._arrived[name.decode(errors="replace")] = (arrival, time.monotonic() + _KEPT_S)
            self._changed.notify_all()

    def _turn_away(self, visitor: _Visitor) -> None:
        self._forget(visitor)
        visitor.connection.close()

    def _forget(self, visitor: _Visitor) -> None:
        self._selector.unregister(visitor.connection)
        self._visitors.remove(visitor)


def _missing(said: bytearray) -> int:
    """Return how many bytes of a hello are still to come. Pure.

    Raises:
        ValueError: this is no hello.
    """
    if len(said) < _PREFIX.size:
        return _PREFIX.size - len(said)
    magic, name_bytes = _PREFIX.unpack_from(said)
    if magic != _MAGIC or name_bytes > MAX_NAME_BYTES:
        raise ValueError("not a hello")
    return _PREFIX.size + int(name_bytes) + _MAC_BYTES - len(said)


def hello(token: bytes, carrier: str, name: str) -> bytes:
    """Return what a sender says first. Pure."""
    encoded = name.encode()
    return _PREFIX.pack(_MAGIC, len(encoded)) + encoded + _mac(token, b"sender", carrier, encoded)


def answer(token: bytes, carrier: str, name: str) -> bytes:
    """Return what a receiver answers; `ANSWER_BYTES` long. Pure."""
    return _mac(token, b"receiver", carrier, name.encode())


def is_answer(said: bytes, token: bytes, carrier: str, name: str) -> bool:
    """Tell whether this is the receiver's answer. Pure."""
    return hmac.compare_digest(said, answer(token, carrier, name))


ANSWER_BYTES = _MAC_BYTES


def _mac(token: bytes, role: bytes, carrier: str, name: bytes) -> bytes:
    return hmac.digest(token, b"\0".join((role, carrier.encode(), name)), "sha256")


def shut(connection: socket.socket) -> None:
    """End a connection for both sides and wake whoever waits on it. Any thread."""
    with contextlib.suppress(OSError):  # it ended already
        connection.shutdown(socket.SHUT_RDWR)
