"""A process that holds the other ends is killed: whoever waits knows at once; what had arrived is still there."""

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from kv_transfer.carriers.socket_links import SocketLinks
from kv_transfer.link import LinkError, ReceiveEnd, SendEnd
from tests.contract.kv_link_victim import SLOT_BYTES, WAIT_S, plan_of

_ROOT = Path(__file__).parents[2]


def _read_line(stream: IO[str]) -> str:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(stream.readline).result(3 * WAIT_S).strip()


def _fill(end: SendEnd) -> None:
    """Send until there is no room, and wait for some."""
    for _ in range(5):
        end.send(end.acquire(WAIT_S), SLOT_BYTES)


def _receive_all(end: ReceiveEnd) -> None:
    while True:
        slot = end.receive()
        assert int(slot.memory[0]) == 9
        end.release(slot)


def test_the_death_of_a_peer_ends_every_wait_for_it() -> None:
    hosts = [SocketLinks("shm", "127.0.0.1"), SocketLinks("tcp", "127.0.0.1")]
    addresses = [links.host() for links in hosts]
    with (
        subprocess.Popen(
            [sys.executable, "-m", "tests.contract.kv_link_victim", *addresses],
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        ) as victim,
        ThreadPoolExecutor(6) as pool,
    ):
        try:
            assert victim.stdout is not None
            receivers: list[ReceiveEnd] = []
            senders: list[SendEnd] = []
            for links in hosts:
                opening = pool.submit(links.open_receive, plan_of(f"{links.backend}-from-victim"))
                theirs = _read_line(victim.stdout)
                receivers.append(opening.result(WAIT_S))
                senders.append(links.open_send(theirs, plan_of(f"{links.backend}-to-victim")))
            assert _read_line(victim.stdout) == "ready"
            waits: list[Future[None]] = [pool.submit(_receive_all, end) for end in receivers]
            waits += [pool.submit(_fill, end) for end in senders]
        finally:
            victim.kill()
        for wait in waits:
            with pytest.raises(LinkError):
                wait.result(WAIT_S / 2)  # less than any deadline of a link
    for sender in senders:
        sender.close()
    for receiver in receivers:
        receiver.close()
    for links in hosts:
        links.close()
