"""Finding the TCP connection under a gloo pair, because gloo itself offers no way to end one.

Measured on torch 2.13: neither `abort()` nor `shutdown()` nor freeing a group wakes a thread of this process that waits
for one of its messages; only the end of the connection does, and that is the peer's to cause. A peer that is frozen, or
behind a broken network, causes nothing, and would pin the waiting thread and its buffers for good. So each end finds
the connection's socket when the link opens and shuts it down itself: gloo then fails all waiters, on both sides, at
once.

A device listens on a port of its own, and a pair is one connection from one side's ephemeral port to the other side's
listening port. With both listening ports known (they are exchanged through the store), the connection is the only
socket of this process that has one of them, so nothing else can be hit. Linux only: descriptors are read from /proc.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

D = TypeVar("D")

_DESCRIPTORS = "/proc/self/fd"
_ATTEMPTS = 10
_device_lock = threading.Lock()


def create_listening(create: Callable[[], D]) -> tuple[D, int]:
    """Create a device and return it with the port that it listens on.

    Raises:
        RuntimeError: other threads opened listening sockets at the same moment, every time.
    """
    with _device_lock:
        for _ in range(_ATTEMPTS):
            before = _listening_ports()
            device = create()
            opened = _listening_ports() - before
            if len(opened) == 1:
                return device, opened.pop()
    raise RuntimeError("the port of the gloo device could not be told")


def find_connection(own_port: int, peer_port: int) -> socket.socket:
    """Return a duplicate of the socket that joins two devices. The caller closes it.

    Raises:
        RuntimeError: there is none, or more than one.
    """
    found: list[socket.socket] = []
    for duplicate in _sockets():
        ends = _ports(duplicate)
        if ends is not None and (ends[0] == own_port or ends[1] == peer_port):
            # Never socket.dup(): it would make the connection blocking, for gloo too.
            found.append(socket.socket(fileno=os.dup(duplicate.fileno())))
    if len(found) == 1:
        return found[0]
    for extra in found:
        extra.close()
    raise RuntimeError(f"{len(found)} connections between gloo devices {own_port} and {peer_port}")


def _listening_ports() -> set[int]:
    return {
        duplicate.getsockname()[1]
        for duplicate in _sockets()
        if duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        and duplicate.family in (socket.AF_INET, socket.AF_INET6)
    }


def _ports(connection: socket.socket) -> tuple[int, int] | None:
    """Return local and remote port; None when it is no TCP connection."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return None
    try:
        return connection.getsockname()[1], connection.getpeername()[1]
    except OSError:  # listening, or closed meanwhile
        return None


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of every socket of this process, each socket once, open until the next is asked for."""
    seen: set[str] = set()  # several descriptors may be one socket: our own duplicates, and those of other threads
    for name in os.listdir(_DESCRIPTORS):
        with contextlib.suppress(OSError):  # a descriptor may be closed by its owner at any moment
            target = os.readlink(f"{_DESCRIPTORS}/{name}")
            if not target.startswith("socket:") or target in seen:
                continue
            with socket.socket(fileno=os.dup(int(name))) as duplicate:
                seen.add(target)
                yield duplicate
