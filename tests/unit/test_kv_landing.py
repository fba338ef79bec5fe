"""The landing zone: every way in which a frame can be wrong is refused before the pool is touched."""

import dataclasses
from collections.abc import Callable
from unittest.mock import create_autospec

import pytest
import torch
from prometheus_client import CollectorRegistry

from core.clock import ManualClock
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import WorkerIdentity
from kv_transfer.box import Box
from kv_transfer.carriers.memory_links import MemoryLinks
from kv_transfer.codec import default_decoders
from kv_transfer.codec_threads import Buffers, CodecThreads
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import HEADER_BYTES, FrameHeader, FrameRefused, seal
from kv_transfer.link import Slot
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.receiver.coverage import Coverage
from kv_transfer.receiver.events import FramesWritten
from kv_transfer.receiver.landing import FrameStamp, Landing, LandingZone
from kv_transfer.receiver.pair import ReceiverPair, ReceiverPairOwner
from kv_transfer.receiver.parts import ReceiverParts
from kv_transfer.session import NackReason
from protos import kv_transfer_pb2 as pb
from tests.kv_peers import LAYOUT, ArrayPool

T, R = TransferId("t/0"), RequestId("t")
TARGET = Box(range(LAYOUT.num_layers), range(LAYOUT.num_kv_heads), range(4, 20))
BOX = Box(range(3), range(2), range(4, 8))
RAW_BYTES = 2 * BOX.volume * LAYOUT.head_dim * 4
HEADER = FrameHeader(T, 3, 7, 1, 0, BOX, LAYOUT.head_dim, "float32", 0, b"", (RAW_BYTES,), RAW_BYTES)


class Site:
    """A pool with one reserved transfer, and the zone over it."""

    def __init__(self) -> None:
        self.pool = ArrayPool()
        self.array = self.pool.clear(R, 20)
        self.landing = Landing(T, R, Coverage(TARGET))
        stamp = FrameStamp(sender_epoch=3, receiver_epoch=7, link_epoch=1)
        self.zone = LandingZone(stamp, LAYOUT, self.pool, default_decoders(), {T: self.landing})

    def land(self, header: FrameHeader, spoil: Callable[[memoryview], None] = lambda message: None) -> Landing | None:
        slot = Slot(0, torch.zeros(HEADER_BYTES + 4096, dtype=torch.uint8))
        slot.memory[HEADER_BYTES:].copy_(torch.arange(4096) % 7)
        seal(header, slot.view())
        spoil(slot.view())
        _, arrival = self.zone.admit(slot)
        if arrival is None or self.zone.write(arrival, slot.memory[HEADER_BYTES:]) is None:
            return None
        return arrival.landing


def _box(**changes: range) -> FrameHeader:
    box = dataclasses.replace(BOX, **changes)
    raw_bytes = 2 * box.volume * LAYOUT.head_dim * 4
    return dataclasses.replace(HEADER, box=box, section_bytes=(raw_bytes,), raw_bytes=raw_bytes)


def _flip(offset: int) -> Callable[[memoryview], None]:
    def spoil(message: memoryview) -> None:
        message[offset] ^= 1

    return spoil


def test_a_good_frame_is_written_and_accounted_for() -> None:
    site = Site()
    assert site.land(HEADER) is site.landing
    assert not site.array[:, :, :, 4:8].isnan().any()
    assert site.array[:, :, :, 8:].isnan().all()
    assert site.landing.written == FramesWritten(1, RAW_BYTES, is_covered=False, raw_bytes=RAW_BYTES)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (dataclasses.replace(HEADER, sender_epoch=2), NackReason.EPOCH),
        (dataclasses.replace(HEADER, receiver_epoch=8), NackReason.EPOCH),
        (dataclasses.replace(HEADER, link_epoch=0), NackReason.EPOCH),
        (dataclasses.replace(HEADER, dtype="bfloat16", head_dim=16), NackReason.SHAPE),
        (dataclasses.replace(HEADER, dtype="float16", raw_bytes=RAW_BYTES // 2), NackReason.SHAPE),
        (_box(heads=range(1, 3)), NackReason.SHAPE),
        (_box(layers=range(1, 4)), NackReason.SHAPE),
        (dataclasses.replace(HEADER, codec_id=77), NackReason.CODEC),
        (dataclasses.replace(HEADER, codec_params=b"x"), NackReason.CODEC),
        (dataclasses.replace(HEADER, section_bytes=(RAW_BYTES - 1,)), NackReason.LENGTH),
        (dataclasses.replace(HEADER, section_bytes=(RAW_BYTES // 2,) * 2), NackReason.LENGTH),
        (dataclasses.replace(HEADER, section_bytes=()), NackReason.LENGTH),
        (_box(tokens=range(3, 8)), NackReason.RANGE),
        (_box(tokens=range(16, 21)), NackReason.RANGE),
    ],
)
def test_a_wrong_frame_is_refused_and_nothing_is_written(header: FrameHeader, reason: NackReason) -> None:
    site = Site()
    with pytest.raises(FrameRefused) as refused:
        site.land(header)
    assert (refused.value.reason, refused.value.transfer_id) == (reason, T)
    assert site.pool.writes == []
    assert site.landing.written.num_frames == 0


@pytest.mark.parametrize("offset", [9, 30, 80, HEADER_BYTES, HEADER_BYTES + RAW_BYTES - 1])
def test_a_damaged_frame_is_refused_and_nothing_is_written(offset: int) -> None:
    site = Site()
    with pytest.raises(FrameRefused):
        site.land(HEADER, _flip(offset))
    assert site.pool.writes == []


def test_a_shard_lands_inside_its_heads_and_nowhere_else() -> None:
    site = Site()
    site.landing.coverage = Coverage(dataclasses.replace(TARGET, heads=range(1, 2)))
    assert site.land(_box(heads=range(1, 2))) is site.landing
    assert not site.array[:, :, 1:, 4:8].isnan().any()
    assert site.array[:, :, :1].isnan().all()
    for heads in (range(1), range(2)):
        with pytest.raises(FrameRefused) as refused:
            site.land(_box(heads=heads, tokens=range(8, 12)))
        assert refused.value.reason == NackReason.RANGE


def test_a_part_is_never_written_twice() -> None:
    site = Site()
    site.land(HEADER)
    with pytest.raises(FrameRefused) as refused:
        site.land(_box(layers=range(1, 2), tokens=range(7, 9)))
    assert refused.value.reason == NackReason.DUPLICATE
    assert len(site.pool.writes) == 1


def test_frames_of_ended_and_unknown_transfers_are_dropped() -> None:
    site = Site()
    assert site.land(dataclasses.replace(HEADER, transfer_id=TransferId("other/0"))) is None
    site.landing.gate.close(lambda: None)
    assert site.land(HEADER) is None
    assert site.pool.writes == []


def test_a_pool_that_refuses_ends_the_transfer() -> None:
    site = Site()
    del site.pool.arrays[R]
    with pytest.raises(FrameRefused) as refused:
        site.land(HEADER)
    assert refused.value.reason == NackReason.POOL
    assert site.landing.written.num_frames == 0
    closed: list[bool] = []
    site.landing.gate.close(lambda: closed.append(True))
    assert closed == [True]


async def test_the_event_loop_never_sees_half_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site()
    owner = create_autospec(ReceiverPairOwner, instance=True)
    parts = ReceiverParts(
        identity=WorkerIdentity(WorkerId("decode"), Epoch(7), "test"),
        config=KvTransferConfig(backend="memory"),
        layout=LAYOUT,
        links=MemoryLinks(),
        writer=site.pool,
        decoders=default_decoders(),
        metrics=KvTransferMetrics(CollectorRegistry()),
        clock=ManualClock(),
        threads=CodecThreads(1, "test"),
        buffers=Buffers(),
    )
    pair = ReceiverPair(pb.SenderHello(worker_id="prefill", epoch=3), parts, lambda message: None, owner)
    pair.landings[T] = site.landing
    honest = FrameHeader.payload_bytes

    def payload_bytes(header: FrameHeader) -> int:
        pair.look()  # as if the loop's thread ran here, in the middle of the accounting
        return honest.__get__(header)  # type: ignore[no-any-return]

    monkeypatch.setattr(FrameHeader, "payload_bytes", property(payload_bytes))
    for start in range(4, 20, 4):
        site.land(_box(tokens=range(start, start + 4)))
    pair.look()
    told = [call.args[2] for call in owner.feed_from.call_args_list]
    assert told == [
        FramesWritten(count, count * RAW_BYTES, is_covered=count == 4, raw_bytes=count * RAW_BYTES)
        for count in range(1, 5)
    ]
