"""The two ends of a link over one plain TCP connection. The owner's thread does everything; there is no other.

A message is eight bytes of length and then the bytes; the receiver answers one byte per message that it has released.
So a sender knows what was consumed, never has more bytes outstanding than twice what the slots of a link hold, however
much the kernel would swallow, and finds a receiver that has stopped. Twice, since a message costs no slot once the
kernel has it (a fifth more goodput than once, measured). Bytes and not messages, or short frames on a long road would
wait for answers most of the time.

`send` returns when the kernel has the message, so one slot is enough to work with, and it stays in the cache: the next
message is gathered into memory that was just read, while the kernel's buffer feeds the wire. The receiver, too, works
in the slot that it just filled. Other slots are made only for an owner that holds several at once.

Every wait has a deadline of its own that begins again with every byte: a slow wire is not a broken one. Only the wait
for a next message has none, since an idle link is healthy; `abort` ends it.
"""

import fcntl
import socket
import struct
import termios
from collections import deque

import torch

from kv_transfer.carriers.socket_end import SocketEnd
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import LinkError, LinkPlan, Slot

_LENGTH = struct.Struct("<Q")
_RELEASED = b"\x01"
_WINDOWS = 2  # of all slots: bytes that may be outstanding
_TIMEVAL = struct.Struct("@ll")
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 10, 5, 3


class _TcpEnd(SocketEnd):
    carrier = "tcp"

    def __init__(self, connection: socket.socket, plan: LinkPlan) -> None:
        super().__init__(connection)
        self._slot_bytes = plan.slot_bytes
        self._num_slots = plan.num_slots
        self._free: list[Slot] = []  # last in, first out: what is in the cache is used again
        self._num_made = 0
        connection.settimeout(None)  # deadlines are the kernel's: a call then moves as much as it can
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that vanished without a word is found although the link idles.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        set_deadline(connection, socket.SO_SNDTIMEO, plan.send_timeout_s)

    def close(self) -> None:
        super().close()
        self._free.clear()

    def _take_slot(self) -> Slot:
        if self._free:
            return self._free.pop()
        if self._num_made >= self._num_slots:
            raise self._broken("its owner holds all slots of this link")
        # Written once here, so that no page fault falls into a transfer.
        slot = Slot(self._num_made, torch.zeros(self._slot_bytes, dtype=torch.uint8))
        self._num_made += 1
        return slot

    def _say(self, words: memoryview, flags: int = 0) -> None:
        try:
            while words:
                words = words[self._connection.send(words, flags) :]
        except BlockingIOError:
            raise self._broken("nothing left within the deadline") from None
        except OSError as error:
            raise self._broken(str(error)) from error


class TcpSendEnd(_TcpEnd):
    """Speaks."""

    def __init__(self, connection: socket.socket, plan: LinkPlan) -> None:
        super().__init__(connection, plan)
        self._free.append(self._take_slot())
        self._unreleased: deque[int] = deque()  # length of each message that the receiver has not released
        self._unreleased_bytes = 0

    def acquire(self, timeout_s: float) -> Slot:
        while self._unreleased_bytes > (_WINDOWS * self._num_slots - 1) * self._slot_bytes:
            self._hear_releases(timeout_s)
        return self._take_slot()

    def send(self, slot: Slot, num_bytes: int) -> None:
        if not HEADER_BYTES <= num_bytes <= slot.memory.numel():
            raise ValueError(f"a message of {num_bytes} bytes does not fit into a slot")
        self._say(memoryview(_LENGTH.pack(num_bytes)), socket.MSG_MORE)
        self._say(slot.view()[:num_bytes])
        self._unreleased.append(num_bytes)
        self._unreleased_bytes += num_bytes
        self._free.append(slot)

    def flush(self, timeout_s: float) -> None:
        while self._unreleased:
            self._hear_releases(timeout_s)

    def _hear_releases(self, timeout_s: float) -> None:
        words = self._wait_for_words(timeout_s)
        if words != _RELEASED * len(words) or not words:
            raise self._broken("what came back is not a release" if words else "the other end is gone")
        for _ in words:
            self._unreleased_bytes -= self._unreleased.popleft()

    def _wait_for_words(self, timeout_s: float) -> bytes:
        try:
            set_deadline(self._connection, socket.SO_RCVTIMEO, timeout_s)
            unsent = self._num_unsent()
            while True:
                try:
                    return self._connection.recv(len(self._unreleased))
                except BlockingIOError:
                    before, unsent = unsent, self._num_unsent()
                    if unsent >= before:
                        self.abort()
                        raise LinkError(f"nothing was taken within {timeout_s:g} s") from None
        except OSError as error:
            raise self._broken(str(error)) from error

    def _num_unsent(self) -> int:
        """Return how many bytes the other host does not have yet: while they become less, a wire is only slow."""
        number: int
        (number,) = struct.unpack("@i", fcntl.ioctl(self._connection, termios.TIOCOUTQ, b"\0" * 4))
        return number


class TcpReceiveEnd(_TcpEnd):
    """Listens."""

    def __init__(self, connection: socket.socket, plan: LinkPlan) -> None:
        super().__init__(connection, plan)
        self._free.append(self._take_slot())
        # The answers of a sender that reads none of them fill a buffer, and then end the link.
        set_deadline(connection, socket.SO_RCVTIMEO, plan.send_timeout_s)
        self._length = bytearray(_LENGTH.size)

    def receive(self) -> Slot:
        self._read(memoryview(self._length), is_begin=True)
        (num_bytes,) = _LENGTH.unpack(self._length)
        if not HEADER_BYTES <= num_bytes <= self._slot_bytes:
            raise self._broken(f"a message of {num_bytes} bytes does not fit into a slot")
        slot = self._take_slot()
        self._read(slot.view()[:num_bytes], is_begin=False)
        return slot

    def release(self, slot: Slot) -> None:
        self._free.append(slot)
        self._say(memoryview(_RELEASED))

    def _read(self, into: memoryview, *, is_begin: bool) -> None:
        """Fill `into`. Before the first byte of a message there is no deadline."""
        try:
            while into:
                try:
                    num_bytes = self._connection.recv_into(into, len(into), socket.MSG_WAITALL)
                except BlockingIOError:
                    if is_begin and len(into) == len(self._length):
                        continue
                    raise self._broken("a message stopped in its middle") from None
                if not num_bytes:
                    raise self._broken("the other end is gone")
                into = into[num_bytes:]
        except OSError as error:
            raise self._broken(str(error)) from error


def set_deadline(connection: socket.socket, option: int, timeout_s: float) -> None:
    """Bound the calls of one direction; the kernel takes 0 for no bound, so that is never said."""
    microseconds = max(1, round(timeout_s * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))
