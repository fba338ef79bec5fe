"""Links over sockets: shared memory, TCP, or whichever of them the two ends have in common (`auto`).

Life of a link: the receiver opens a door (`link_door`) with a listening socket per carrier and says their addresses on
the control stream; for every link the sender takes the best carrier that it can use, connects, and says its hello; the
receiver, which waits at the door for the link's name, answers and learns from the door which carrier it became.

Shared memory is best, and can be used when both run under one kernel in one network namespace (`link_address`).
"""

import os
import secrets
import socket
import struct
import threading
import time
from typing import Literal

from kv_transfer.carriers.link_address import (
    TOKEN_BYTES,
    CarrierAddress,
    HostIdentity,
    ShmAddress,
    TcpAddress,
    own_identity,
    parse_address,
)
from kv_transfer.carriers.link_door import ANSWER_BYTES, Door, answer, hello, is_answer
from kv_transfer.carriers.shm_ends import ShmReceiveEnd, ShmSendEnd
from kv_transfer.carriers.shm_segment import create_segment, map_segment
from kv_transfer.carriers.tcp_ends import TcpReceiveEnd, TcpSendEnd
from kv_transfer.link import LinkError, LinkPlan, ReceiveEnd, SendEnd

SocketBackend = Literal["auto", "shm", "tcp"]

_CARRIERS: dict[SocketBackend, tuple[str, ...]] = {"auto": ("shm", "tcp"), "shm": ("shm",), "tcp": ("tcp",)}
_SEGMENT = struct.Struct("<IQ")  # number of slots, bytes of each


class SocketLinks:
    """Carrier of the `auto`, `shm` and `tcp` backends."""

    def __init__(self, backend: SocketBackend, host: str, *, identity: HostIdentity | None = None) -> None:
        """Use the interface of `host` for TCP. `identity` is only for tests: where this process pretends to run."""
        self.backend = backend
        self._carriers = _CARRIERS[backend]
        self._host = host
        self._identity = identity or own_identity()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._lock = threading.Lock()
        self._door: Door | None = None
        self._address = ""

    def host(self) -> str:
        with self._lock:
            if self._door is None:
                self._open_door()
            return self._address

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        deadline = time.monotonic() + plan.open_timeout_s
        target = self._choose(parse_address(address))
        try:
            connection = _connect(target, plan.open_timeout_s)
            try:
                carrier = "shm" if isinstance(target, ShmAddress) else "tcp"
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.sendall(hello(target.token, carrier, plan.name))
                if isinstance(target, ShmAddress):
                    return _meet_over_memory(connection, target, plan)
                said = _read_answer(connection, deadline)
                if not is_answer(said, target.token, "tcp", plan.name):
                    raise LinkError(f"{plan.name}: somebody else answers at {target.host}:{target.port}")
                return TcpSendEnd(connection, plan)
            except BaseException:
                connection.close()
                raise
        except TimeoutError:
            raise LinkError(f"{plan.name}: the receiver did not come within {plan.open_timeout_s:g} s") from None
        except OSError as error:
            raise LinkError(f"{plan.name}: {error}") from error

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        with self._lock:
            door = self._door
        if door is None:
            raise LinkError("nothing is hosted here")
        arrival = door.meet(plan.name, plan.open_timeout_s)
        connection = arrival.connection
        try:
            connection.settimeout(plan.open_timeout_s)
            said = answer(self._token, arrival.carrier, plan.name)
            if arrival.carrier == "tcp":
                connection.sendall(said)
                return TcpReceiveEnd(connection, plan)
            segment, descriptor = create_segment(plan.num_slots, plan.slot_bytes)
            try:
                said += _SEGMENT.pack(plan.num_slots, plan.slot_bytes)
                socket.send_fds(connection, [said], [descriptor])
            finally:
                os.close(descriptor)
            return ShmReceiveEnd(connection, segment)
        except OSError as error:
            connection.close()
            raise LinkError(f"{plan.name}: {error}") from error
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            if self._door is not None:
                self._door.close()
                self._door = None

    def _open_door(self) -> None:
        listeners: dict[str, socket.socket] = {}
        offers: list[CarrierAddress] = []
        try:
            if "shm" in self._carriers and self._identity is not None:
                name = f"tandem-kv-{secrets.token_hex(8)}"
                listeners["shm"] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listeners["shm"].bind(f"\0{name}")
                offers.append(ShmAddress(self._identity, name, self._token))
            if "tcp" in self._carriers:
                listeners["tcp"] = socket.create_server((self._host, 0), family=_family(self._host))
                offers.append(TcpAddress(self._host, listeners["tcp"].getsockname()[1], self._token))
            if not offers:
                raise LinkError("this system does not tell where a process runs: memory cannot be shared")
        except BaseException:
            for listener in listeners.values():
                listener.close()
            raise
        self._door = Door(listeners, self._token)
        self._address = " ".join(map(str, offers))

    def _choose(self, offers: tuple[CarrierAddress, ...]) -> CarrierAddress:
        """Return the best offer that can be used from here. Pure."""
        shared = [offer for offer in offers if isinstance(offer, ShmAddress) and offer.identity == self._identity]
        reachable = [offer for offer in offers if isinstance(offer, TcpAddress)]
        usable: list[CarrierAddress] = []
        if "shm" in self._carriers:
            usable += shared
        if "tcp" in self._carriers:
            usable += reachable
        if not usable:
            raise LinkError(f"the receiver offers no carrier that works between it and here as {self.backend}")
        return usable[0]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _connect(target: CarrierAddress, timeout_s: float) -> socket.socket:
    if isinstance(target, TcpAddress):
        return socket.create_connection((target.host, target.port), timeout_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{target.socket_name}")
    except BaseException:
        connection.close()
        raise
    return connection


def _read_answer(connection: socket.socket, deadline: float) -> bytes:
    said = b""
    while len(said) < ANSWER_BYTES:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(ANSWER_BYTES - len(said))
        if not more:
            raise LinkError("the receiver turned this side away")
        said += more
    return said


def _meet_over_memory(connection: socket.socket, target: ShmAddress, plan: LinkPlan) -> SendEnd:
    said, descriptors, _, _ = socket.recv_fds(connection, ANSWER_BYTES + _SEGMENT.size, 1)
    try:
        if not said:
            raise LinkError("the receiver turned this side away")
        if not is_answer(said[:ANSWER_BYTES], target.token, "shm", plan.name) or len(descriptors) != 1:
            raise LinkError(f"{plan.name}: somebody else answers at {target.socket_name}")
        if len(said) != ANSWER_BYTES + _SEGMENT.size:
            raise LinkError(f"{plan.name}: the answer names no segment")
        num_slots, slot_bytes = _SEGMENT.unpack_from(said, ANSWER_BYTES)
        if slot_bytes != plan.slot_bytes:
            raise LinkError(f"{plan.name}: slots of {slot_bytes} bytes, {plan.slot_bytes} were agreed on")
        return ShmSendEnd(connection, map_segment(descriptors[0], num_slots, slot_bytes))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
