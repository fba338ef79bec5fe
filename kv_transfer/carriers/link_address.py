"""What a receiver says about where it can be met: one word per carrier that it offers, in one string.

The string travels on the control stream (`LinkOpened.rendezvous`). It carries a random token, so that only whoever was
told by the control stream can meet: what else connects, by accident or to look around, is turned away by `link_door`.

    shm,<boot id>,<network namespace>,<socket name>,<token> tcp,<host>,<port>,<token>

Shared memory is offered to whoever runs under the same kernel and in the same network namespace, which is the reach of
abstract socket names; whether that is so, the sender finds out by comparing.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from kv_transfer.link import LinkError

TOKEN_BYTES = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = "/proc/self/ns/net"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Which kernel and which network namespace a process runs in."""

    boot_id: str
    namespace: str


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """An abstract unix socket, and where that name means something."""

    identity: HostIdentity
    socket_name: str
    token: bytes

    def __str__(self) -> str:
        return f"shm,{self.identity.boot_id},{self.identity.namespace},{self.socket_name},{self.token.hex()}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int
    token: bytes

    def __str__(self) -> str:
        return f"tcp,{self.host},{self.port},{self.token.hex()}"


CarrierAddress = ShmAddress | TcpAddress


def own_identity() -> HostIdentity | None:
    """Return the identity of this process; None where the system does not tell: then memory cannot be shared."""
    try:
        return HostIdentity(_BOOT_ID.read_text(encoding="ascii").strip(), str(os.stat(_NETWORK_NAMESPACE).st_ino))
    except OSError:
        return None


def parse_address(address: str) -> tuple[CarrierAddress, ...]:
    """Return what is offered, in the order of the string. Pure.

    Raises:
        LinkError: not an address of these carriers.
    """
    return tuple(_parse_word(word) for word in address.split())


def _parse_word(word: str) -> CarrierAddress:
    try:
        match word.split(","):
            case ["shm", boot_id, namespace, socket_name, token]:
                return ShmAddress(HostIdentity(boot_id, namespace), socket_name, _token(token))
            case ["tcp", host, port, token] if 0 < int(port) < 65536:
                return TcpAddress(host, int(port), _token(token))
            case _:
                raise LinkError(f"{word[:100]!r} is not the address of a carrier that is known here")
    except ValueError as error:
        raise LinkError(f"{word[:100]!r} is not an address: {error}") from error


def _token(text: str) -> bytes:
    token = bytes.fromhex(text)
    if len(token) != TOKEN_BYTES:
        raise ValueError(f"a token of {len(token)} bytes")
    return token
