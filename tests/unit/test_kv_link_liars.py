"""Peers of socket links that lie: about slots, lengths, releases and segments. The link breaks; nothing else does."""

import os
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.ids import TransferId
from kv_transfer import frame
from kv_transfer.box import Box
from kv_transfer.carriers.shm_ends import ShmReceiveEnd, ShmSendEnd
from kv_transfer.carriers.shm_segment import create_segment, map_segment
from kv_transfer.carriers.tcp_ends import TcpReceiveEnd, TcpSendEnd
from kv_transfer.frame import HEADER_BYTES, FrameHeader
from kv_transfer.link import LinkError, LinkPlan

SLOT_BYTES = HEADER_BYTES + 4096
NUM_SLOTS = 2
WAIT_S = 20.0
PLAN = LinkPlan("kv/p@1/d@1/1", SLOT_BYTES, NUM_SLOTS, WAIT_S, send_timeout_s=0.2)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), WAIT_S)
        theirs, _ = listener.accept()
        theirs.settimeout(WAIT_S)
        return ours, theirs


def _unix_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(WAIT_S)
    return ours, theirs


def _shm_receiver(connection: socket.socket) -> ShmReceiveEnd:
    segment, descriptor = create_segment(NUM_SLOTS, SLOT_BYTES)
    os.close(descriptor)
    return ShmReceiveEnd(connection, segment)


def _shm_sender(connection: socket.socket) -> ShmSendEnd:
    segment, descriptor = create_segment(NUM_SLOTS, SLOT_BYTES)
    os.close(descriptor)
    return ShmSendEnd(connection, segment)


def _message(slot: int, num_bytes: int) -> bytes:
    return struct.pack("<II", slot, num_bytes)


# --- shared memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "match"),
    [
        pytest.param(_message(NUM_SLOTS, SLOT_BYTES), "not the sender's", id="a slot that is not there"),
        pytest.param(_message(2**32 - 1, SLOT_BYTES), "not the sender's", id="the last number there is"),
        pytest.param(_message(0, SLOT_BYTES + 1), "does not fit", id="longer than a slot"),
        pytest.param(_message(0, 2**32 - 1), "does not fit", id="as long as can be said"),
        pytest.param(_message(0, HEADER_BYTES - 1), "does not fit", id="shorter than a header"),
        pytest.param(_message(0, 0), "does not fit", id="nothing"),
        pytest.param(b"abc", "not a message", id="a part of a message"),
    ],
)
def test_a_lie_about_shared_slots_breaks_the_link(said: bytes, match: str) -> None:
    ours, theirs = _unix_pair()
    end = _shm_receiver(ours)
    with theirs:
        theirs.sendall(said)
        with pytest.raises(LinkError, match=match):
            end.receive()
        with pytest.raises(LinkError, match="aborted"):
            end.receive()
        assert theirs.recv(1) == b""
    end.close()


def test_a_slot_that_the_receiver_works_in_cannot_arrive_again() -> None:
    ours, theirs = _unix_pair()
    end = _shm_receiver(ours)
    with theirs:
        theirs.sendall(_message(1, SLOT_BYTES) * 2)
        assert end.receive().index == 1
        with pytest.raises(LinkError, match="not the sender's"):
            end.receive()
    end.close()


def test_a_sender_that_reads_no_releases_cannot_hold_the_receiver_up() -> None:
    ours, theirs = _unix_pair()
    end = _shm_receiver(ours)

    with theirs:
        theirs.setblocking(False)

        def exchange() -> None:
            for _ in range(10**6):
                theirs.send(_message(0, SLOT_BYTES))
                end.release(end.receive())

        with pytest.raises(LinkError):
            exchange()
    end.close()


@pytest.mark.parametrize("index", [0, 1, 7])
def test_a_release_of_what_was_not_sent_breaks_the_link(index: int) -> None:
    ours, theirs = _unix_pair()
    end = _shm_sender(ours)
    with theirs:
        for _ in range(NUM_SLOTS):
            slot = end.acquire(WAIT_S)
        end.send(slot, SLOT_BYTES)
        theirs.sendall(struct.pack("<I", index if index != slot.index else 0))
        with pytest.raises(LinkError, match="was not sent"):
            end.acquire(WAIT_S)
    end.close()


def test_a_segment_can_be_made_neither_smaller_nor_larger() -> None:
    _, descriptor = create_segment(NUM_SLOTS, SLOT_BYTES)
    for size in (0, 1 << 24):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


def _plain_memory() -> int:
    descriptor = os.memfd_create("not sealed")
    os.ftruncate(descriptor, 8192 * NUM_SLOTS)
    return descriptor


def _other_size() -> int:
    return create_segment(NUM_SLOTS + 1, SLOT_BYTES)[1]


def _no_memory() -> int:
    return os.open("/dev/null", os.O_RDWR)


@pytest.mark.parametrize("make", [_plain_memory, _other_size, _no_memory])
def test_a_segment_that_could_kill_its_reader_is_not_mapped(make: Callable[[], int]) -> None:
    descriptor = make()
    with pytest.raises(LinkError):
        map_segment(descriptor, NUM_SLOTS, SLOT_BYTES)
    os.close(descriptor)


def test_a_header_that_changes_while_it_is_read_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(range(2), range(2), range(3))
    sealed = FrameHeader(TransferId("t"), 1, 1, 1, 0, box, 8, "float32", 0, b"", (768,), 768)
    message = bytearray(HEADER_BYTES + 768)
    frame.seal(sealed, memoryview(message))
    reader = frame.decode_header

    def read_and_scribble(area: memoryview, max_payload_bytes: int) -> frame.FrameHeader:
        header = reader(area, max_payload_bytes)
        message[:HEADER_BYTES] = b"\xff" * HEADER_BYTES  # as a sender could that shares the slot
        return header

    monkeypatch.setattr(frame, "decode_header", read_and_scribble)
    assert frame.decode(memoryview(message)) == sealed


# --- tcp --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, HEADER_BYTES - 1, SLOT_BYTES + 1, 2**63, 2**64 - 1])
def test_a_lie_about_the_length_breaks_the_link(num_bytes: int) -> None:
    ours, theirs = _tcp_pair()
    end = TcpReceiveEnd(ours, PLAN)
    with theirs:
        theirs.sendall(struct.pack("<Q", num_bytes))
        with pytest.raises(LinkError, match="does not fit"):
            end.receive()
    end.close()


@pytest.mark.parametrize("said", [b"\0\0\0", struct.pack("<Q", SLOT_BYTES) + b"x" * 1000], ids=["length", "body"])
def test_a_message_that_stops_in_its_middle_breaks_the_link(said: bytes) -> None:
    ours, theirs = _tcp_pair()
    end = TcpReceiveEnd(ours, PLAN)
    with theirs:
        theirs.sendall(said)
        with pytest.raises(LinkError, match="stopped in its middle"):
            end.receive()
    end.close()


def test_an_idle_link_is_healthy_for_longer_than_any_deadline() -> None:
    ours, theirs = _tcp_pair()
    end = TcpReceiveEnd(ours, PLAN)
    with theirs:
        said = struct.pack("<Q", SLOT_BYTES) + b"x" * SLOT_BYTES
        later = threading.Timer(3 * PLAN.send_timeout_s, theirs.sendall, [said])
        later.start()
        assert end.receive().view() == b"x" * SLOT_BYTES
        later.join()
    end.close()


@pytest.mark.parametrize("said", [b"\2", b"\1\2"])
def test_what_is_not_a_release_breaks_the_link(said: bytes) -> None:
    ours, theirs = _tcp_pair()
    end = TcpSendEnd(ours, PLAN)
    with theirs:
        for _ in range(NUM_SLOTS):
            end.send(end.acquire(WAIT_S), SLOT_BYTES)
        theirs.sendall(said)
        with pytest.raises(LinkError, match="not a release"):
            end.flush(WAIT_S)
    end.close()


def test_releases_that_were_not_owed_are_never_counted() -> None:
    ours, theirs = _tcp_pair()
    end = TcpSendEnd(ours, PLAN)
    with theirs:
        theirs.sendall(b"\1" * 100)
        for _ in range(2 * NUM_SLOTS):
            end.send(end.acquire(WAIT_S), HEADER_BYTES)
            end.flush(WAIT_S)
    end.close()


def test_a_receiver_that_reads_nothing_is_a_timeout_of_send() -> None:
    ours, theirs = _tcp_pair()
    large = LinkPlan(PLAN.name, 64 << 20, NUM_SLOTS, WAIT_S, send_timeout_s=0.2)
    end = TcpSendEnd(ours, large)
    with theirs:
        slot = end.acquire(WAIT_S)
        with pytest.raises(LinkError, match="within the deadline"):
            end.send(slot, 64 << 20)  # more than the kernel has room for
    end.close()


def test_a_slow_wire_is_not_a_broken_one() -> None:
    ours, theirs = _tcp_pair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # what is sent waits on this side
    num_bytes = 3 << 20
    end = TcpSendEnd(ours, LinkPlan(PLAN.name, num_bytes, NUM_SLOTS, WAIT_S, send_timeout_s=0.2))
    never = threading.Event()

    def read_slowly() -> None:
        left = num_bytes + 8
        while left:  # for longer than any deadline of the sender
            never.wait(0.02)
            left -= len(theirs.recv(min(left, 64 * 1024), socket.MSG_WAITALL))
        theirs.sendall(b"\1")

    with theirs, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_slowly)
        end.send(end.acquire(WAIT_S), num_bytes)
        end.flush(0.2)
        reading.result(WAIT_S)
    end.close()


def test_short_messages_do_not_wait_for_each_other() -> None:
    ours, theirs = _tcp_pair()
    end = TcpSendEnd(ours, PLAN)
    with theirs:
        for _ in range(NUM_SLOTS * SLOT_BYTES // HEADER_BYTES - SLOT_BYTES // HEADER_BYTES):
            end.send(end.acquire(0.001), HEADER_BYTES)  # nothing was released
        theirs.sendall(b"\1" * 3)
        for _ in range(3):
            end.send(end.acquire(WAIT_S), HEADER_BYTES)
    end.close()


def test_an_abort_ends_a_send_that_waits() -> None:
    ours, theirs = _tcp_pair()
    large = LinkPlan(PLAN.name, 64 << 20, NUM_SLOTS, WAIT_S, send_timeout_s=WAIT_S)
    end = TcpSendEnd(ours, large)
    with theirs:
        threading.Timer(0.1, end.abort).start()
        with pytest.raises(LinkError, match="aborted"):
            end.send(end.acquire(WAIT_S), 64 << 20)
    end.close()
