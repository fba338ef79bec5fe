"""The mirror of the store: records, KV events, gaps, outages. Against the in-memory store, on a real event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from core.clock import ManualClock
from core.errors import WorkerLost
from core.ids import Epoch, WorkerId
from core.kv_events import BlocksStored, KvEventBatch, Tier
from core.membership import Role, WorkerRecord, WorkerState, kv_event_stream, worker_key
from core.store_memory import MemoryStore
from protos.codec import kv_events_to_wire
from router.broadcast import Broadcast
from router.config import MirrorConfig
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots
from router.mirror import CacheSnapshot, StoreMirror

A = WorkerId("a")
PATIENCE_S = 5.0


class WatchedStore(MemoryStore):
    """Tells when it was scanned, well or in vain."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.scanned = Broadcast()

    async def scan(self, prefix: str) -> Mapping[str, bytes]:
        self.scanned.notify()
        return await super().scan(prefix)


class WatchedIndex(PrefixIndex):
    """Tells when it was changed."""

    def __init__(self, news: Broadcast) -> None:
        super().__init__(2**20, WorkerSlots())
        self._news = news

    def store(
        self, worker_id: WorkerId, hashes: Sequence[bytes], tier: Tier = Tier.DEVICE, *, parent: bytes = b""
    ) -> None:
        super().store(worker_id, hashes, tier, parent=parent)
        self._news.notify()

    def remove(self, worker_id: WorkerId, hashes: Iterable[bytes], tier: Tier = Tier.DEVICE) -> None:
        super().remove(worker_id, hashes, tier)
        self._news.notify()

    def forget(self, worker_id: WorkerId) -> None:
        super().forget(worker_id)
        self._news.notify()


class Bench:
    """A mirror, its store, and a worker that can be asked for snapshots."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = WatchedStore(self.clock)
        self.news = Broadcast()
        self.index = WatchedIndex(self.news)
        self.snapshots: list[CacheSnapshot | WorkerLost] = []
        self.num_asked = 0
        self.mirror = StoreMirror(
            self.store,
            "c",
            self.clock,
            MirrorConfig(poll_interval_s=0.005, forget_after_s=10.0),
            self.index,
            fetch_snapshot=self.fetch,
            on_change=self.news.notify,
        )

    async def fetch(self, record: WorkerRecord) -> CacheSnapshot:
        self.num_asked += 1
        answer = self.snapshots.pop(0) if self.snapshots else WorkerLost("not connected")
        if isinstance(answer, WorkerLost):
            raise answer
        return answer

    async def register(self, epoch: int = 1, state: WorkerState = WorkerState.LOADING) -> None:
        record = WorkerRecord(worker_id=A, role=Role.PREFILL, epoch=Epoch(epoch), state=state)
        await self.store.put(worker_key("c", A), record.model_dump_json().encode())

    async def publish(self, sequence: int, *blocks: bytes, epoch: int = 1) -> None:
        batch = KvEventBatch(A, Epoch(epoch), sequence, (BlocksStored(b"\0" * 16, blocks),))
        await self.store.append(kv_event_stream("c", A), kv_events_to_wire(batch).SerializeToString(), max_entries=100)

    def holds(self, block: bytes) -> bool:
        return self.index.match((block,)).holders() == {A: 1}

    async def scans(self, count: int) -> None:
        """Wait for so many scans to begin; all but the last are over then."""
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(count):
                await self.store.scanned.next().wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                news = self.news.next()
                if condition():
                    return
                await news.wait()


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    task = asyncio.create_task(made.mirror.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


async def test_records_and_events_are_followed() -> None:
    async with bench() as it:
        await it.register()
        await it.until(lambda: A in it.mirror.records)
        await it.publish(1, block(1))
        await it.publish(2, block(2))
        await it.until(lambda: it.holds(block(1)) and it.holds(block(2)))
        assert it.num_asked == 0, "a cache seen from its first event needs no snapshot"


async def test_a_worker_that_serves_already_is_asked_for_its_cache() -> None:
    async with bench() as it:
        it.snapshots = [WorkerLost("not yet"), CacheSnapshot(Epoch(1), 7, (BlocksStored(b"", (block(7),)),))]
        await it.register(state=WorkerState.READY)
        await it.until(lambda: it.holds(block(7)))
        await it.publish(7, block(9))
        await it.publish(8, block(8))
        await it.until(lambda: it.holds(block(8)))
        assert not it.holds(block(9)), "the snapshot includes number 7"


async def test_a_listing_that_comes_late_takes_nothing_back_that_was_promised_meanwhile() -> None:
    async with bench() as it:
        await it.register(state=WorkerState.READY)
        await it.until(lambda: A in it.mirror.records)
        it.index.predict(A, (block(1),), now=0.0, ttl_s=10.0)
        it.snapshots = [CacheSnapshot(Epoch(1), 0, ())]
        await it.publish(1, block(2))
        await it.until(lambda: it.holds(block(2)))
        assert it.holds(block(1))


async def test_a_gap_is_closed_by_a_snapshot_and_nothing_after_it_is_missed() -> None:
    async with bench() as it:
        await it.register()
        await it.publish(1, block(1))
        await it.until(lambda: it.holds(block(1)))
        it.snapshots = [
            CacheSnapshot(Epoch(1), 1, (BlocksStored(b"", (block(1),)),)),  # taken before the gap: asked again
            CacheSnapshot(Epoch(1), 3, (BlocksStored(b"", (block(2),)), BlocksStored(b"", (block(3),)))),
        ]
        await it.publish(3, block(3))
        await it.publish(4, block(4))
        await it.until(lambda: it.holds(block(4)))
        assert [it.holds(block(number)) for number in (1, 2, 3)] == [False, True, True]


async def test_a_new_epoch_empties_the_cache() -> None:
    async with bench() as it:
        await it.register()
        await it.publish(1, block(1))
        await it.until(lambda: it.holds(block(1)))
        await it.register(epoch=2)
        await it.until(lambda: not it.holds(block(1)))
        await it.publish(1, block(2), epoch=2)
        await it.publish(2, block(3), epoch=1)
        await it.until(lambda: it.holds(block(2)))
        assert not it.holds(block(3)), "a dead incarnation's last words"


async def test_a_worker_that_left_is_forgotten() -> None:
    async with bench() as it:
        await it.register()
        await it.publish(1, block(1))
        await it.until(lambda: it.holds(block(1)))
        await it.store.delete(worker_key("c", A))
        await it.scans(2)
        assert it.holds(block(1)), "it may have been the store's memory that failed"
        it.clock.advance(10.0)
        await it.until(lambda: A not in it.mirror.records)
        assert not it.holds(block(1))


async def test_an_outage_leaves_everything_as_it_was_and_counts_the_age() -> None:
    async with bench() as it:
        await it.register()
        await it.publish(1, block(1))
        await it.until(lambda: it.holds(block(1)))
        it.store.set_available(False)
        it.clock.advance(30.0)
        assert it.mirror.staleness_s == 30.0
        await it.scans(2)
        assert it.mirror.staleness_s == 30.0
        assert A in it.mirror.records
        assert it.holds(block(1))
        it.store.set_available(True)
        await it.register(state=WorkerState.DRAINING)
        await it.until(lambda: it.mirror.records[A].state is WorkerState.DRAINING)
        assert it.mirror.staleness_s == 0.0
        await it.publish(2, block(2))
        await it.until(lambda: it.holds(block(2)))


async def test_rubbish_in_the_store_is_survived() -> None:
    async with bench() as it:
        await it.store.put(worker_key("c", WorkerId("odd")), b"no json")
        await it.register()
        await it.until(lambda: A in it.mirror.records)
        assert set(it.mirror.records) == {A}
        it.snapshots = [CacheSnapshot(Epoch(1), 5, (BlocksStored(b"", (block(5),)),))]
        await it.store.append(kv_event_stream("c", A), b"\xff\xff", max_entries=100)
        await it.until(lambda: it.holds(block(5)))
        await it.publish(6, block(6))
        await it.until(lambda: it.holds(block(6)))


async def test_an_unreadable_record_is_told_once_per_content(caplog: pytest.LogCaptureFixture) -> None:
    async with bench() as it:
        for content in (b"not json", b"{}"):
            await it.store.put(worker_key("c", WorkerId("bad")), content)
            await it.scans(4)
        told = [record for record in caplog.records if "holds no worker record" in record.getMessage()]
        assert len(told) == 2


async def test_what_is_no_hash_loses_the_feed_and_a_snapshot_without_it_mends_that() -> None:
    async with bench() as it:
        await it.register()
        await it.publish(1, block(1))
        await it.until(lambda: it.holds(block(1)))
        it.snapshots = [
            CacheSnapshot(Epoch(1), 2, (BlocksStored(b"", (b"no hash",)),)),
            CacheSnapshot(Epoch(1), 2, (BlocksStored(b"", (block(2),)),)),
        ]
        await it.publish(2, b"no hash")
        await it.until(lambda: it.holds(block(2)))
        assert it.num_asked == 2
        await it.publish(3, block(3))
        await it.until(lambda: it.holds(block(3)))
