"""One suite for every carrier: both ends in this process, each on a thread of its own; real sockets, real memory."""

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kv_transfer.carriers.link_address import HostIdentity
from kv_transfer.carriers.memory_links import MemoryHub, MemoryLinks
from kv_transfer.carriers.process_group_links import ProcessGroupLinks
from kv_transfer.carriers.socket_links import SocketBackend, SocketLinks
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import LinkError, LinkPlan, Links, SendEnd
from tests.kv_link_ends import WAIT_S, joined

SLOT_BYTES = HEADER_BYTES + 4096
_names = itertools.count()


def _open(carrier: str) -> Links:
    match carrier:
        case "memory":
            return MemoryLinks(MemoryHub())
        case "gloo":
            return ProcessGroupLinks("gloo", "127.0.0.1")
        case "shm" | "tcp" | "auto":
            return SocketLinks(carrier, "127.0.0.1")
        case _:
            raise AssertionError(carrier)


@pytest.fixture(params=["memory", "gloo", "shm", "tcp", "auto"])
def links(request: pytest.FixtureRequest) -> Iterator[Links]:
    carrier = _open(request.param)
    yield carrier
    carrier.close()


def _plan(*, open_timeout_s: float = WAIT_S, num_slots: int = 2) -> LinkPlan:
    return LinkPlan(f"kv/p@1/d@1/{next(_names)}", SLOT_BYTES, num_slots, open_timeout_s)


def _send(end: SendEnd, value: int, num_bytes: int = SLOT_BYTES) -> None:
    slot = end.acquire(WAIT_S)
    slot.memory.fill_(value)
    end.send(slot, num_bytes)


def test_messages_arrive_whole_and_in_order(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        received: list[int] = []

        def listen() -> None:
            for _ in range(20):
                slot = receiver.receive()
                assert bool((slot.memory == slot.memory[0]).all())
                received.append(int(slot.memory[0]))
                receiver.release(slot)

        thread = threading.Thread(target=listen)
        thread.start()
        for value in range(20):
            _send(sender, value)
        sender.flush(WAIT_S)
        thread.join(WAIT_S)
        assert received == list(range(20))


def test_a_short_message_leaves_the_link_whole(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        for value, num_bytes in ((1, HEADER_BYTES), (2, HEADER_BYTES + 100), (3, SLOT_BYTES)):
            _send(sender, value, num_bytes)
            slot = receiver.receive()
            assert slot.view()[:num_bytes] == bytes([value]) * num_bytes
            receiver.release(slot)


def test_a_receiver_may_hold_every_slot(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        for value in (1, 2):
            _send(sender, value)
        held = [receiver.receive(), receiver.receive()]
        assert [int(slot.memory[-1]) for slot in held] == [1, 2]
        for slot in held:
            receiver.release(slot)
        sender.flush(WAIT_S)
        _send(sender, 3)
        assert int(receiver.receive().memory[-1]) == 3


def test_a_slot_that_was_not_needed_keeps_nobody_waiting(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        _send(sender, 1)
        spare = sender.acquire(WAIT_S)
        receiver.release(receiver.receive())
        sender.flush(WAIT_S)
        spare.memory.fill_(2)
        sender.send(spare, SLOT_BYTES)
        assert int(receiver.receive().memory[0]) == 2


def test_slots_are_aligned_for_every_dtype(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        slot = sender.acquire(WAIT_S)
        assert slot.memory.data_ptr() % 64 == 0
        sender.send(slot, SLOT_BYTES)
        assert receiver.receive().memory.data_ptr() % 64 == 0


@pytest.mark.parametrize("num_bytes", [0, HEADER_BYTES - 1, SLOT_BYTES + 1])
def test_a_message_that_would_kill_the_receiver_is_never_sent(links: Links, num_bytes: int) -> None:
    with joined(links, _plan()) as (sender, receiver):
        slot = sender.acquire(WAIT_S)
        with pytest.raises(ValueError, match="does not fit"):
            sender.send(slot, num_bytes)
        sender.send(slot, SLOT_BYTES)
        receiver.receive()


def test_an_aborted_receiver_wakes_up(links: Links) -> None:
    with joined(links, _plan()) as (_, receiver):
        threading.Timer(0.05, receiver.abort).start()
        with pytest.raises(LinkError):
            receiver.receive()
        with pytest.raises(LinkError):
            receiver.receive()


def test_an_aborted_sender_wakes_up(links: Links) -> None:
    with joined(links, _plan()) as (sender, _receiver):
        threading.Timer(0.05, sender.abort).start()

        def send_on() -> None:
            for value in range(10):  # more than both sides have room for
                _send(sender, value)

        with pytest.raises(LinkError):
            send_on()


def test_closing_one_end_releases_the_other(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        threading.Timer(0.05, sender.close).start()
        with pytest.raises(LinkError):
            receiver.receive()


def test_a_sender_whose_receiver_closed_fails(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        receiver.close()

        def send_on() -> None:
            for value in range(10):
                _send(sender, value)
                sender.flush(WAIT_S)

        with pytest.raises(LinkError):
            send_on()


def test_a_receiver_that_takes_nothing_is_a_timeout_for_the_sender(links: Links) -> None:
    with joined(links, _plan()) as (sender, _receiver):

        def send_on() -> None:
            for value in range(5):  # two slots here, two there, and none comes back
                slot = sender.acquire(0.2)
                slot.memory.fill_(value)
                sender.send(slot, SLOT_BYTES)

        with pytest.raises(LinkError):
            send_on()


def test_an_end_that_waits_alone_gives_up(links: Links) -> None:
    links.host()
    with pytest.raises(LinkError):
        links.open_receive(_plan(open_timeout_s=0.3))


def test_a_sender_that_waits_alone_gives_up(links: Links) -> None:
    with pytest.raises(LinkError):
        links.open_send(links.host(), _plan(open_timeout_s=0.3))


def test_a_rebuilt_link_under_a_new_name_works(links: Links) -> None:
    for value in (1, 2):
        with joined(links, _plan()) as (sender, receiver):
            _send(sender, value)
            assert int(receiver.receive().memory[0]) == value


def test_many_links_may_open_at_once_and_nobody_meets_a_stranger(links: Links) -> None:
    plans = [_plan() for _ in range(4)]
    address = links.host()
    with ThreadPoolExecutor(2 * len(plans)) as pool:
        receivers = [pool.submit(links.open_receive, plan) for plan in plans]
        senders = [pool.submit(links.open_send, address, plan) for plan in reversed(plans)]
        opened = [(s.result(WAIT_S), r.result(WAIT_S)) for s, r in zip(reversed(senders), receivers, strict=True)]
    for value, (sender, receiver) in enumerate(opened):
        _send(sender, value)
        assert int(receiver.receive().memory[0]) == value
    for sender, receiver in opened:
        sender.close()
        receiver.close()


def test_open_links_outlive_their_meeting_place(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        links.close()
        _send(sender, 7)
        assert int(receiver.receive().memory[0]) == 7


def test_abort_and_close_may_come_often(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        for end in (sender, receiver):
            end.abort()
            end.abort()
            end.close()
            end.close()


def test_nothing_touches_the_default_group(links: Links) -> None:
    with joined(links, _plan()) as (sender, receiver):
        _send(sender, 1)
        receiver.receive()
        assert not dist.is_initialized()


@pytest.mark.parametrize("carrier", ["gloo", "shm", "tcp", "auto"])
def test_an_address_that_is_nowhere_is_a_link_error(carrier: str) -> None:
    links = _open(carrier)
    for address in ("", "127.0.0.1:1", "nonsense", "tcp,127.0.0.1,1,00", f"tcp,127.0.0.1,1,{'00' * 16}"):
        with pytest.raises(LinkError):
            links.open_send(address, _plan(open_timeout_s=0.3))


# --- which carrier a pair becomes -------------------------------------------------------------------------------------

_HERE, _ELSEWHERE = HostIdentity("boot", "1"), HostIdentity("boot", "2")


@pytest.mark.parametrize(
    ("sender", "receiver", "carrier"),
    [
        pytest.param(("auto", _HERE), ("auto", _HERE), "shm", id="one host"),
        pytest.param(("auto", _HERE), ("auto", _ELSEWHERE), "tcp", id="another network namespace"),
        pytest.param(("tcp", _HERE), ("auto", _HERE), "tcp", id="the sender wants tcp"),
        pytest.param(("auto", _HERE), ("tcp", _HERE), "tcp", id="the receiver wants tcp"),
        pytest.param(("auto", _HERE), ("shm", _HERE), "shm", id="the receiver wants shm"),
        pytest.param(("shm", _HERE), ("shm", _ELSEWHERE), None, id="memory does not reach that far"),
        pytest.param(("shm", _HERE), ("tcp", _HERE), None, id="nothing in common"),
    ],
)
def test_a_pair_takes_the_best_carrier_that_both_have(
    sender: tuple[SocketBackend, HostIdentity], receiver: tuple[SocketBackend, HostIdentity], carrier: str | None
) -> None:
    here = SocketLinks(sender[0], "127.0.0.1", identity=sender[1])
    there = SocketLinks(receiver[0], "127.0.0.1", identity=receiver[1])
    if carrier is None:
        with pytest.raises(LinkError, match="no carrier"):
            here.open_send(there.host(), _plan(open_timeout_s=0.3))
    else:
        with joined(there, _plan(), senders=here) as (send_end, receive_end):
            assert send_end.carrier == receive_end.carrier == carrier
            _send(send_end, 5)
            assert int(receive_end.receive().memory[0]) == 5
    there.close()
    here.close()


@pytest.mark.parametrize("carrier", ["memory", "gloo", "shm", "tcp"])
def test_an_end_says_what_it_is_carried_by(carrier: str) -> None:
    links = _open(carrier)
    with joined(links, _plan()) as (sender, receiver):
        assert sender.carrier == receiver.carrier == carrier
    links.close()


# --- carriers over sockets --------------------------------------------------------------------------------------------


def _leftovers() -> tuple[int, int]:
    """Return how many descriptors this process has open, and how many segments it has mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return len(os.listdir("/proc/self/fd")), maps.count("tandem-kv-link")


@pytest.mark.parametrize("carrier", ["shm", "tcp", "auto"])
def test_closed_links_leave_nothing_behind(carrier: str) -> None:
    before = _leftovers()
    links = _open(carrier)
    for _ in range(3):
        with joined(links, _plan()) as (sender, receiver):
            _send(sender, 1)
            receiver.release(receiver.receive())
    with pytest.raises(LinkError):
        links.open_receive(_plan(open_timeout_s=0.05))
    links.close()
    assert _leftovers() == before


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_a_name_is_met_once(carrier: str) -> None:
    links, plan = _open(carrier), _plan(open_timeout_s=0.5)
    with joined(links, plan) as (sender, receiver):
        with pytest.raises(LinkError):
            links.open_send(links.host(), plan)
        _send(sender, 4)
        assert int(receiver.receive().memory[0]) == 4
    links.close()


# --- gloo only --------------------------------------------------------------------------------------------------------


def test_gloo_can_carry_header_first_as_nccl_must() -> None:
    from core.ids import TransferId
    from kv_transfer.box import Box
    from kv_transfer.frame import FrameHeader, decode, seal

    links = ProcessGroupLinks("gloo", "127.0.0.1", carriage="header_first")
    with joined(links, _plan()) as (sender, receiver):
        for num_tokens in (1, 64):
            box, raw_bytes = Box(range(1), range(1), range(num_tokens)), num_tokens * 64
            header = FrameHeader(TransferId("t"), 1, 1, 1, 0, box, 8, "float32", 0, b"", (raw_bytes,), raw_bytes)
            slot = sender.acquire(WAIT_S)
            slot.memory[HEADER_BYTES:].copy_(torch.arange(4096) % 251)
            sender.send(slot, seal(header, slot.view()))
            arrived = receiver.receive()
            assert decode(arrived.view()) == header
            receiver.release(arrived)
    links.close()
