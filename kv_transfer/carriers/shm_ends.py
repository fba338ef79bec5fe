"""The two ends of a link over shared memory: the sender gathers into the slots that the receiver works in.

Two copies in all, those that paging makes unavoidable: out of the sender's pool, into the receiver's. A unix socket
carries eight bytes per message (slot, length) one way and four per release (slot) the other. When either process dies,
the kernel ends its socket, and the other side knows at once; the segment goes with the last of the two.

The receiver does not trust the sender: numbers are checked, a slot that the receiver holds cannot arrive again, and a
size can never change (`shm_segment`). What stays possible is that a sender writes into a slot while the receiver reads
it. That must not be able to do more than spoil the sender's own transfer: `frame.decode` takes its own copy of the
header area and reads nothing of it twice; bytes of a raw payload are copied without being looked at, whatever they are;
payloads that are decoded are copied out of the slot first. A frame is checked against its checksum here as everywhere:
it costs little in cache, and finds a slot that was reused too early, which no socket would.
"""

import socket
import struct
from collections import deque

from kv_transfer.carriers.shm_segment import Segment
from kv_transfer.carriers.socket_end import SocketEnd
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import LinkError, Slot

_MESSAGE = struct.Struct("<II")  # slot, length
_RELEASE = struct.Struct("<I")  # slot


class _ShmEnd(SocketEnd):
    carrier = "shm"

    def __init__(self, connection: socket.socket, segment: Segment) -> None:
        super().__init__(connection)
        self._slots = segment.slots

    def close(self) -> None:
        super().close()
        self._slots = ()

    def _say(self, words: bytes) -> None:
        try:
            self._connection.send(words, socket.MSG_DONTWAIT)
        except OSError as error:  # also a peer that reads nothing: there is room for far more than its slots
            raise self._broken(str(error)) from error

    def _hear(self, size: int, timeout_s: float | None) -> bytes:
        try:
            self._connection.settimeout(timeout_s)
            words = self._connection.recv(size)
        except TimeoutError:
            self.abort()
            raise LinkError(f"nothing was taken within {timeout_s:g} s") from None
        except OSError as error:
            raise self._broken(str(error)) from error
        if not words:
            raise self._broken("the other end is gone")
        if len(words) != size:
            raise self._broken(f"{len(words)} bytes are not a message of this link")
        return words


class ShmSendEnd(_ShmEnd):
    """Speaks. Its slots are the receiver's."""

    def __init__(self, connection: socket.socket, segment: Segment) -> None:
        super().__init__(connection, segment)
        self._free = deque(segment.slots)
        self._in_flight: set[int] = set()

    def acquire(self, timeout_s: float) -> Slot:
        if not self._free:
            self._hear_release(timeout_s)
        return self._free.popleft()

    def send(self, slot: Slot, num_bytes: int) -> None:
        if not HEADER_BYTES <= num_bytes <= slot.memory.numel():
            raise ValueError(f"a message of {num_bytes} bytes does not fit into a slot")
        self._say(_MESSAGE.pack(slot.index, num_bytes))
        self._in_flight.add(slot.index)

    def flush(self, timeout_s: float) -> None:
        while self._in_flight:
            self._hear_release(timeout_s)

    def close(self) -> None:
        super().close()
        self._free.clear()
        self._in_flight.clear()

    def _hear_release(self, timeout_s: float) -> None:
        (index,) = _RELEASE.unpack(self._hear(_RELEASE.size, timeout_s))
        if index not in self._in_flight:
            raise self._broken(f"slot {index} was released and was not sent")
        self._in_flight.remove(index)
        self._free.append(self._slots[index])


class ShmReceiveEnd(_ShmEnd):
    """Listens. The segment is its own."""

    def __init__(self, connection: socket.socket, segment: Segment) -> None:
        super().__init__(connection, segment)
        self._held: set[int] = set()

    def receive(self) -> Slot:
        index: int
        index, num_bytes = _MESSAGE.unpack(self._hear(_MESSAGE.size, None))
        if index >= len(self._slots) or index in self._held:
            raise self._broken(f"slot {index} is not the sender's to send")
        slot = self._slots[index]
        if not HEADER_BYTES <= num_bytes <= slot.memory.numel():
            raise self._broken(f"a message of {num_bytes} bytes does not fit into a slot")
        self._held.add(index)
        return slot

    def release(self, slot: Slot) -> None:
        self._held.discard(slot.index)
        self._say(_RELEASE.pack(slot.index))
