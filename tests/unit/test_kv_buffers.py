"""Memory that coded frames wait in, the threads that code them, and the gauge of a link."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.clock import ManualClock
from core.ids import RequestId, TransferId
from kv_transfer.box import Box
from kv_transfer.codec import RAW
from kv_transfer.codec_threads import Buffers, CodecThreads, Scratch
from kv_transfer.sender.encoding import EncodeFailed, EncodeJob, FrameEncoder, largest_raw_bytes
from kv_transfer.sender.link_gauge import LinkGauge
from kv_transfer.sender.outgoing import Outgoing
from tests.kv_codecs import FlippingEncoder
from tests.kv_peers import LAYOUT, PATIENCE_S, ArrayPool

MIB = 1024 * 1024


def test_what_is_given_back_is_lent_again() -> None:
    buffers = Buffers()
    first = buffers.lend(100_000)
    assert first.numel() >= 100_000
    assert first.data_ptr() % 64 == 0
    buffers.give_back(first)
    assert buffers.lend(90_000) is first
    assert buffers.lend(90_000) is not first


def test_a_large_buffer_is_not_wasted_on_a_small_frame() -> None:
    buffers = Buffers()
    large = buffers.lend(10 * MIB)
    buffers.give_back(large)
    assert buffers.lend(1000) is not large


@given(st.lists(st.integers(0, 300_000), max_size=30))
def test_idle_memory_is_capped_and_lent_memory_is_counted(sizes: list[int]) -> None:
    buffers = Buffers(max_idle_bytes=MIB)
    lent: list[Tensor] = [buffers.lend(size) for size in sizes]
    assert buffers.lent_bytes == sum(buffer.numel() for buffer in lent)
    assert len({buffer.data_ptr() for buffer in lent}) == len(lent)
    for buffer in lent:
        buffers.give_back(buffer)
    assert buffers.lent_bytes == 0
    assert buffers._idle_bytes == sum(buffer.numel() for buffer in buffers._idle) <= MIB


def test_scratch_is_one_per_thread() -> None:
    scratch = Scratch()
    mine = scratch.room(1000)
    assert scratch.room(500) is mine
    theirs: list[Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(scratch.room(1000)))
    thread.start()
    thread.join(PATIENCE_S)
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_closing_runs_what_is_queued_and_refuses_more(caplog: pytest.LogCaptureFixture) -> None:
    threads = CodecThreads(2, "test")
    done: list[int] = []
    for number in range(20):
        threads.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    threads.submit(lambda: done.append(1 // 0))  # the thread that runs it goes on
    assert threads.close(PATIENCE_S)
    assert sorted(done) == list(range(20))
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(lambda: None)


def test_closing_does_not_wait_for_ever() -> None:
    threads, release = CodecThreads(1, "test"), threading.Event()
    threads.submit(lambda: [None][not release.wait(PATIENCE_S)])
    assert not threads.close(0.05)
    release.set()
    assert threads.close(PATIENCE_S)


@given(st.floats(0.05, 1.2), st.integers(1, 10**7), st.integers(1, 10**8))
def test_a_frame_is_as_large_as_its_promise_allows(bound: float, room: int, limit: int) -> None:
    encoder = FlippingEncoder(bound=bound)
    raw_bytes = largest_raw_bytes(encoder, room, limit)
    assert encoder.max_payload_bytes(raw_bytes) <= room
    assert raw_bytes == limit or encoder.max_payload_bytes(raw_bytes + 1) > room
    assert largest_raw_bytes(RAW, room, limit) == min(room, limit)


def _send_at_10_mib_per_s(gauge: LinkGauge, clock: ManualClock) -> None:
    """Twenty frames of 1 MiB, and the news of all of them at the end, when the last has been decoded."""
    gauge.opened(1, "tcp")
    for _ in range(20):
        gauge.sent(MIB, is_backlogged=True)
        clock.advance(0.1)
    clock.advance(5.0)
    for index in range(20):
        gauge.arrived(1, (index + 1) * MIB, 5.0 + (19 - index) * 0.1)


def test_a_link_is_not_blamed_for_its_decoders() -> None:
    clock = ManualClock()
    gauge = LinkGauge(clock, None)
    _send_at_10_mib_per_s(gauge, clock)
    assert gauge.view(7).queued_bytes == 7
    goodput = gauge.view(0).goodput_bytes_per_s
    assert goodput is not None
    assert 9 * MIB <= goodput <= 11 * MIB


def test_the_rate_cap_is_the_link() -> None:
    clock = ManualClock()
    gauge = LinkGauge(clock, 2.0 * MIB)
    assert gauge.view(0).goodput_bytes_per_s == 2.0 * MIB
    _send_at_10_mib_per_s(gauge, clock)
    assert gauge.view(0).goodput_bytes_per_s == 2.0 * MIB


def test_news_of_an_older_link_are_ignored() -> None:
    gauge = LinkGauge(ManualClock(), None)
    gauge.opened(2, "tcp")
    gauge.sent(MIB, is_backlogged=False)
    gauge.arrived(1, MIB, 0.0)
    assert gauge.view(0).queued_bytes == MIB
    gauge.arrived(2, MIB, 0.0)
    assert gauge.view(0).queued_bytes == 0


class NoBuffers(Buffers):
    def lend(self, num_bytes: int) -> Tensor:
        raise MemoryError(f"no {num_bytes} bytes")


def test_a_frame_that_there_is_no_memory_for_fails_at_once() -> None:
    told: list[bool] = []
    outgoing = Outgoing(TransferId("a"), RequestId("a"), num_tokens=4, heads=range(2))
    box = Box(range(1), range(2), range(4))
    job = EncodeJob(FrameEncoder(LAYOUT, ArrayPool()), outgoing, box, NoBuffers(), lambda: told.append(job.is_done))
    job.run()
    assert told == [True]
    with pytest.raises(EncodeFailed, match="MemoryError"):
        job.result()
    job.discard()
