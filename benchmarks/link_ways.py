"""Ways to move one contiguous, warm buffer into another: what a hand-off is compared with, per class of carrier.

- `gloo`: one gloo message of everything. `tcp`: one plain connection, one `sendall`, one receiving loop that asks for
  everything. These are the raw sends: nothing of ours is in them but the loop.
- `carrier`: the same bytes as messages of a link of ours, copied into and out of its slots: no pool, no header, no
  checksum, no control stream. For shared memory this is the raw send too, since slots are all there is to send over.

Both sides run in the processes, and on the cores, that the hand-offs run in.
"""

import socket
from typing import Protocol

import torch

from kv_transfer.carriers.links import open_links
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import LinkPlan, ReceiveEnd, SendEnd

_WAIT_S = 60.0


class NearWay(Protocol):
    """The near side of a way."""

    def send(self, payload: torch.Tensor) -> None:
        """Return when the far side has it all."""
        ...

    def close(self) -> None: ...


class FarWay(Protocol):
    """The far side of a way."""

    def receive(self, payload: torch.Tensor) -> None: ...

    def close(self) -> None: ...


class PlainTcp:
    """One connection without anything of ours; either side."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._connection = connection

    def send(self, payload: torch.Tensor) -> None:
        self._connection.sendall(memoryview(payload.numpy()))  # type: ignore[arg-type]  # arrays are buffers
        if not self._connection.recv(1):
            raise ConnectionError("the other side is gone")

    def receive(self, payload: torch.Tensor) -> None:
        rest = memoryview(payload.numpy())  # type: ignore[arg-type]  # arrays are buffers
        while rest:
            num_bytes = self._connection.recv_into(rest, len(rest), socket.MSG_WAITALL)
            if not num_bytes:
                raise ConnectionError("the other side is gone")
            rest = rest[num_bytes:]
        self._connection.sendall(b"!")

    def close(self) -> None:
        self._connection.close()


class CarrierNear:
    """Messages over the sending end of a link of ours."""

    def __init__(self, end: SendEnd, slot_bytes: int) -> None:
        self._end, self._room = end, slot_bytes - HEADER_BYTES

    def send(self, payload: torch.Tensor) -> None:
        for piece in _pieces(payload, self._room):
            slot = self._end.acquire(_WAIT_S)
            slot.memory[HEADER_BYTES : HEADER_BYTES + len(piece)].copy_(piece)
            self._end.send(slot, HEADER_BYTES + len(piece))
        self._end.flush(_WAIT_S)

    def close(self) -> None:
        self._end.close()


class CarrierFar:
    """Messages over the receiving end of a link of ours."""

    def __init__(self, end: ReceiveEnd, slot_bytes: int) -> None:
        self._end, self._room = end, slot_bytes - HEADER_BYTES

    def receive(self, payload: torch.Tensor) -> None:
        for piece in _pieces(payload, self._room):
            slot = self._end.receive()
            piece.copy_(slot.memory[HEADER_BYTES : HEADER_BYTES + len(piece)])
            self._end.release(slot)

    def close(self) -> None:
        self._end.close()


def _pieces(payload: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [payload[start : start + size] for start in range(0, len(payload), size)]


def plan_of(config: KvTransferConfig) -> LinkPlan:
    return LinkPlan("benchmark/contiguous", config.slot_bytes, config.num_slots, _WAIT_S, config.send_timeout_s)


class FarWays:
    """The far side of both: hosts, tells where, and takes part."""

    def __init__(self, config: KvTransferConfig) -> None:
        self._config = config
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links = open_links(config)
        self.addresses = {"tcp": f"127.0.0.1:{self._listener.getsockname()[1]}", "carrier": self._links.host()}

    def open(self) -> dict[str, FarWay]:
        """Meet the near side, which opens them in the same order."""
        connection, _ = self._listener.accept()
        end = self._links.open_receive(plan_of(self._config))
        self._listener.close()
        self._links.close()
        return {"tcp": PlainTcp(connection), "carrier": CarrierFar(end, self._config.slot_bytes)}


def open_near_ways(config: KvTransferConfig, addresses: dict[str, str]) -> dict[str, NearWay]:
    host, _, port = addresses["tcp"].rpartition(":")
    connection = socket.create_connection((host, int(port)), _WAIT_S)
    end = open_links(config).open_send(addresses["carrier"], plan_of(config))
    return {"tcp": PlainTcp(connection), "carrier": CarrierNear(end, config.slot_bytes)}
