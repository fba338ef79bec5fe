"""The door where links meet: strangers cost nothing and take nobody's place; only the token lets a sender in."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from kv_transfer.carriers import link_door
from kv_transfer.carriers.link_address import TcpAddress, parse_address
from kv_transfer.carriers.link_door import MAX_NAME_BYTES, Arrival, Door, answer, hello, is_answer
from kv_transfer.carriers.socket_links import SocketLinks
from kv_transfer.link import LinkError, LinkPlan, ReceiveEnd

TOKEN = bytes(16)
WAIT_S = 20.0
NAME = "kv/p@1/d@1/1"


@contextmanager
def _door() -> Iterator[tuple[Door, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    door = Door({"tcp": listener}, TOKEN)
    port = listener.getsockname()[1]
    try:
        yield door, port
    finally:
        door.close()


@contextmanager
def _meeting(door: Door, name: str = NAME, timeout_s: float = WAIT_S) -> Iterator[Future[Arrival]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(door.meet, name, timeout_s)


def _knock(port: int, said: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), WAIT_S)
    connection.sendall(said)
    return connection


def _is_turned_away(connection: socket.socket) -> bool:
    with connection:
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True


def test_a_sender_that_knows_the_token_is_met() -> None:
    with _door() as (door, port), _meeting(door) as meeting:
        sender = _knock(port, hello(TOKEN, "tcp", NAME) + b"what follows")
        arrival = meeting.result(WAIT_S)
        assert arrival.carrier == "tcp"
        assert arrival.connection.recv(100) == b"what follows"
        sender.close()
        arrival.connection.close()


def test_a_hello_may_come_in_crumbs() -> None:
    with _door() as (door, port), _meeting(door) as meeting:
        sender = _knock(port, b"")
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in hello(TOKEN, "tcp", NAME):
            sender.send(bytes([byte]))
        meeting.result(WAIT_S).connection.close()
        sender.close()


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(hello(bytes(15) + b"\1", "tcp", NAME), id="another token"),
        pytest.param(hello(TOKEN, "shm", NAME), id="a hello for another carrier"),
        pytest.param(hello(TOKEN, "tcp", NAME)[:-1] + b"\0", id="a spoiled hash"),
        pytest.param(b"TDKL\x01\xff\xff", id="a name that is too long"),
        pytest.param(b"TDKL\x02\x01\x00", id="another version"),
    ],
)
def test_who_does_not_know_the_token_is_turned_away_and_holds_up_nobody(said: bytes) -> None:
    with _door() as (door, port), _meeting(door) as meeting:
        assert _is_turned_away(_knock(port, said))
        sender = _knock(port, hello(TOKEN, "tcp", NAME))
        meeting.result(WAIT_S).connection.close()
        sender.close()


def test_a_crowd_that_says_nothing_does_not_keep_the_peer_out() -> None:
    with _door() as (door, port), _meeting(door) as meeting, ExitStack() as crowd:
        for _ in range(100):  # more than there are places to wait
            crowd.enter_context(_knock(port, b""))
        sender = crowd.enter_context(_knock(port, hello(TOKEN, "tcp", NAME)))
        arrival = crowd.enter_context(meeting.result(WAIT_S).connection)
        assert arrival.getpeername() == sender.getsockname()


def test_a_stranger_that_speaks_while_it_is_turned_away_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with _door() as (door, port), ExitStack() as everybody:
        stranger = everybody.enter_context(_knock(port, b""))
        first = everybody.enter_context(_knock(port, hello(TOKEN, "tcp", "first")))
        everybody.enter_context(door.meet("first", WAIT_S).connection)
        monkeypatch.setattr(link_door, "_MAX_VISITORS", 1)  # the stranger has the only place
        sender = everybody.enter_context(_knock(port, hello(TOKEN, "tcp", NAME)))
        stranger.sendall(b"GET /")  # both are found ready at once, the newcomer first
        arrival = everybody.enter_context(door.meet(NAME, WAIT_S).connection)
        assert arrival.getpeername() == sender.getsockname() != first.getsockname()


def test_whoever_comes_second_under_a_name_is_turned_away() -> None:
    with _door() as (door, port), _meeting(door, "other") as other:
        first = _knock(port, hello(TOKEN, "tcp", NAME))
        second = _knock(port, hello(TOKEN, "tcp", NAME))
        assert _is_turned_away(second)
        arrival = door.meet(NAME, WAIT_S).connection
        assert arrival.getpeername() == first.getsockname()
        door.close()
        with pytest.raises(LinkError):
            other.result(WAIT_S)
        first.close()
        arrival.close()


def test_arrivals_for_others_are_kept_for_them() -> None:
    names = [f"kv/{number}" for number in range(6)]
    with _door() as (door, port), ThreadPoolExecutor(len(names)) as pool:
        meetings = [pool.submit(door.meet, name, WAIT_S) for name in names[:3]]
        senders = [_knock(port, hello(TOKEN, "tcp", name)) for name in reversed(names)]
        meetings += [pool.submit(door.meet, name, WAIT_S) for name in names[3:]]
        for meeting, sender in zip(meetings, reversed(senders), strict=True):
            arrival = meeting.result(WAIT_S).connection
            assert arrival.getpeername() == sender.getsockname()
            arrival.close()
            sender.close()


def test_nobody_waits_longer_than_they_said() -> None:
    with _door() as (door, _), _meeting(door, "patient") as patient:
        with pytest.raises(LinkError, match="nobody came"):
            door.meet(NAME, 0.05)
        assert not patient.done()
        door.close()
        with pytest.raises(LinkError, match="closed"):
            patient.result(WAIT_S)


def test_a_closed_door_lets_nobody_in() -> None:
    with _door() as (door, port):
        door.close()
        door.close()
        with pytest.raises(LinkError, match="closed"):
            door.meet(NAME, WAIT_S)
        with pytest.raises(ConnectionRefusedError):
            _knock(port, b"")


def test_a_name_has_a_longest_length() -> None:
    name = "n" * MAX_NAME_BYTES
    with _door() as (door, port), _meeting(door, name) as meeting:
        sender = _knock(port, hello(TOKEN, "tcp", name))
        meeting.result(WAIT_S).connection.close()
        sender.close()


def test_an_answer_is_of_its_carrier_name_and_token() -> None:
    said = answer(TOKEN, "tcp", NAME)
    assert is_answer(said, TOKEN, "tcp", NAME)
    assert not is_answer(said, TOKEN, "shm", NAME)
    assert not is_answer(said, TOKEN, "tcp", "other")
    assert not is_answer(said, b"\1" * 16, "tcp", NAME)
    assert said not in hello(TOKEN, "tcp", NAME)


@pytest.mark.parametrize("said", [b"", b"x" * 32], ids=["nothing", "a wrong answer"])
def test_a_sender_leaves_a_receiver_that_does_not_know_the_token(said: bytes) -> None:
    links = SocketLinks("tcp", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def pose() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=pose)
        thread.start()
        address = TcpAddress("127.0.0.1", impostor.getsockname()[1], TOKEN)
        with pytest.raises(LinkError, match=r"turned this side away|somebody else"):
            links.open_send(str(address), LinkPlan(NAME, 8192, 2, WAIT_S))
        thread.join(WAIT_S)


def test_addresses_survive_being_written_and_read() -> None:
    links = SocketLinks("auto", "127.0.0.1")
    address = links.host()
    assert " ".join(map(str, parse_address(address))) == address
    assert links.host() == address
    links.close()


def test_a_stranger_does_not_disturb_a_link_that_is_open() -> None:
    links = SocketLinks("tcp", "127.0.0.1")
    (offer,) = parse_address(links.host())
    assert isinstance(offer, TcpAddress)
    plan = LinkPlan(NAME, 8192, 2, WAIT_S)
    with ThreadPoolExecutor(1) as pool, _knock(offer.port, b"hello?"):
        opening: Future[ReceiveEnd] = pool.submit(links.open_receive, plan)
        sender = links.open_send(links.host(), plan)
        receiver = opening.result(WAIT_S)
        with _knock(offer.port, b"hello?"):
            slot = sender.acquire(WAIT_S)
            slot.memory.fill_(3)
            sender.send(slot, 8192)
            assert int(receiver.receive().memory[0]) == 3
        sender.close()
        receiver.close()
    links.close()
