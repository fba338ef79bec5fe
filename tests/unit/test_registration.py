"""A worker's record and events in the store: leases, outages, overflow, fencing."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from core.clock import MonotonicClock
from core.errors import ConfigError, ServingError, WorkerLost
from core.ids import Epoch, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, KvEventBatch
from core.membership import (
    LoadReport,
    Role,
    WorkerRecord,
    WorkerState,
    epoch_key,
    kv_event_stream,
    worker_key,
)
from core.registration import Registration, RegistrationConfig
from core.store import STREAM_START
from core.store_memory import MemoryStore
from protos import codec, worker_pb2

C = "test"
W = WorkerId("p0")
EVENT = BlocksStored(b"r" * 16, (b"a" * 16, b"b" * 16))
DEADLINE_S = 10.0


def encode(batch: KvEventBatch) -> bytes:
    return codec.kv_events_to_wire(batch).SerializeToString()


class WatchedStore(MemoryStore):
    """A memory store on which tests can wait instead of polling."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Condition()

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes, *, ttl_s: float | None = None
    ) -> bool:
        done = await super().compare_and_set(key, expected, value, ttl_s=ttl_s)
        async with self.changed:
            self.changed.notify_all()
        return done

    async def append(self, stream: str, value: bytes, *, max_entries: int) -> str:
        entry_id = await super().append(stream, value, max_entries=max_entries)
        async with self.changed:
            self.changed.notify_all()
        return entry_id

    async def record(self) -> WorkerRecord | None:
        value = await self.get(worker_key(C, W))
        return None if value is None else WorkerRecord.model_validate_json(value)

    async def batches(self) -> list[KvEventBatch]:
        found = await self.read({kv_event_stream(C, W): STREAM_START}, max_entries=100, wait_s=0)
        return [
            codec.kv_events_from_wire(worker_pb2.KvEventBatch.FromString(entry.value))
            for entry in found.get(kv_event_stream(C, W), [])
        ]

    async def until_record(self, is_wanted: Callable[[WorkerRecord], bool]) -> WorkerRecord:
        async with asyncio.timeout(DEADLINE_S), self.changed:
            while True:
                record = await self.record()
                if record is not None and is_wanted(record):
                    return record
                await self.changed.wait()

    async def until_batches(self, num: int) -> list[KvEventBatch]:
        async with asyncio.timeout(DEADLINE_S), self.changed:
            while len(found := await self.batches()) < num:
                await self.changed.wait()
            return found


def make(
    store: MemoryStore,
    fenced: list[Epoch],
    failures: asyncio.Queue[ServingError] | None = None,
    *,
    epoch: int = 1,
    buffer_bytes: int = 4096,
) -> Registration:
    record = WorkerRecord(worker_id=W, role=Role.PREFILL, epoch=Epoch(epoch), state=WorkerState.STARTING)
    config = RegistrationConfig(lease_s=0.6, event_buffer_bytes=buffer_bytes)
    if failures is None:
        failures = asyncio.Queue()
    return Registration(
        store,
        C,
        record,
        config,
        MonotonicClock(),
        encode=encode,
        on_fenced=fenced.append,
        on_failed=failures.put_nowait,
    )


@pytest.fixture
def store() -> WatchedStore:
    return WatchedStore()


@pytest.fixture
def fenced() -> list[Epoch]:
    return []


@pytest.fixture
async def registration(store: WatchedStore, fenced: list[Epoch]) -> AsyncIterator[Registration]:
    it = make(store, fenced)
    it.start()
    yield it
    await it.stop(DEADLINE_S)


async def test_a_change_of_state_is_written_at_once_and_the_load_with_the_next_renewal(
    store: WatchedStore, registration: Registration
) -> None:
    await store.until_record(lambda record: record.state is WorkerState.STARTING)
    registration.update(state=WorkerState.READY, address="h:1")
    assert (await store.until_record(lambda record: record.state is WorkerState.READY)).address == "h:1"
    registration.update(load=LoadReport(num_running=3))
    await store.until_record(lambda record: record.load.num_running == 3)


async def test_the_record_outlives_its_first_lease_and_ends_as_stopped(
    store: WatchedStore, registration: Registration
) -> None:
    first = await store.until_record(lambda _: True)
    async with asyncio.timeout(DEADLINE_S), store.changed:
        for _ in range(5):  # renewals: five thirds of the lease
            await store.changed.wait()
            assert await store.record() == first
    await registration.stop(DEADLINE_S)
    assert (await store.until_record(lambda _: True)).state is WorkerState.STOPPED


async def test_events_are_numbered_and_kept_in_order(store: WatchedStore, registration: Registration) -> None:
    assert registration.publish([]) == 0
    assert registration.publish([EVENT]) == 1
    assert registration.publish([BlocksRemoved((b"a" * 16,)), EVENT]) == 2
    first, second = await store.until_batches(2)
    assert first == KvEventBatch(W, Epoch(1), 1, (EVENT,))
    assert (second.sequence, second.events) == (2, (BlocksRemoved((b"a" * 16,)), EVENT))


async def test_an_outage_is_survived_and_nothing_is_lost(store: WatchedStore, registration: Registration) -> None:
    await store.until_record(lambda _: True)
    store.set_available(False)
    registration.publish([EVENT])
    registration.update(state=WorkerState.READY)
    registration.publish([EVENT])
    store.set_available(True)
    await store.delete(worker_key(C, W))  # its lease ran out meanwhile
    await store.until_record(lambda record: record.state is WorkerState.READY)
    assert [batch.sequence for batch in await store.until_batches(2)] == [1, 2]


async def test_an_overflow_shows_as_a_gap(store: WatchedStore, fenced: list[Epoch]) -> None:
    registration = make(store, fenced, buffer_bytes=1024)
    for _ in range(40):
        registration.publish([EVENT])
    assert registration.overflows > 0
    registration.start()
    store_after = registration.publish([EVENT])
    batches = await store.until_batches(2)
    await registration.stop(DEADLINE_S)
    batches = await store.batches()
    assert batches[0].events == ()
    assert batches[0].sequence > 1
    numbers = [batch.sequence for batch in batches]
    assert numbers == list(range(numbers[0], store_after + 1))


async def test_a_newer_record_fences_and_is_not_overwritten(
    store: WatchedStore, registration: Registration, fenced: list[Epoch]
) -> None:
    await store.until_record(lambda _: True)
    heir = registration.record.with_(epoch=2, state=WorkerState.READY)
    await store.put(worker_key(C, W), heir.model_dump_json().encode())
    registration.update(state=WorkerState.READY)
    await store.until_record(lambda record: record.epoch == 2)
    await registration.stop(DEADLINE_S)
    assert fenced == [2]
    assert await store.record() == heir


async def test_a_newer_epoch_handed_out_fences_before_the_heir_registers(
    store: WatchedStore, registration: Registration, fenced: list[Epoch]
) -> None:
    await store.until_record(lambda _: True)
    await store.increment(epoch_key(C, W))
    await store.increment(epoch_key(C, W))
    registration.update(state=WorkerState.READY)
    await registration.stop(DEADLINE_S)
    assert fenced == [2]
    record = await store.record()
    assert record is None or record.state is WorkerState.STARTING


async def test_an_older_incarnation_is_replaced(store: WatchedStore, fenced: list[Epoch]) -> None:
    older = WorkerRecord(worker_id=W, role=Role.PREFILL, epoch=Epoch(1), state=WorkerState.READY)
    await store.put(worker_key(C, W), older.model_dump_json().encode())
    registration = make(store, fenced, epoch=2)
    registration.start()
    await store.until_record(lambda record: record.epoch == 2)
    await registration.stop(DEADLINE_S)
    assert fenced == []


async def test_a_foreign_value_in_place_of_the_epoch_is_named_and_ends_the_registration(
    store: WatchedStore, fenced: list[Epoch]
) -> None:
    await store.put(epoch_key(C, W), b"not ours")
    failures = asyncio.Queue[ServingError]()
    registration = make(store, fenced, failures)
    registration.start()
    async with asyncio.timeout(DEADLINE_S):
        failure = await failures.get()
    assert isinstance(failure, ConfigError)
    assert epoch_key(C, W) in str(failure)
    assert "not ours" in str(failure)
    await registration.stop(DEADLINE_S)
    assert (await store.record(), fenced, failures.qsize()) == (None, [], 0)


async def test_a_defect_in_the_registration_is_not_silent(store: WatchedStore, fenced: list[Epoch]) -> None:
    class BrokenStore(WatchedStore):
        async def append(self, stream: str, value: bytes, *, max_entries: int) -> str:
            raise ZeroDivisionError("a defect")

    failures = asyncio.Queue[ServingError]()
    registration = make(BrokenStore(), fenced, failures)
    registration.start()
    registration.publish([EVENT])
    async with asyncio.timeout(DEADLINE_S):
        failure = await failures.get()
    assert isinstance(failure, WorkerLost)
    assert "a defect" in str(failure)
    await registration.stop(DEADLINE_S)
