"""The supervisor over processes that a test commands: restarts, fences, stops, and what it tells."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from cluster.supervision.backoff import BackOffConfig
from cluster.supervision.epochs import EpochLedger
from cluster.supervision.fencing import StoreFencer
from cluster.supervision.incarnation import Incarnation, ServiceSpec, SpawnError
from cluster.supervision.lifecycle import LifePolicy, LifeState
from cluster.supervision.supervisor import ServiceStatus, Supervisor
from core.clock import MonotonicClock
from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerRecord, WorkerState, epoch_key, worker_key
from core.store_memory import MemoryStore

FAST = BackOffConfig(base_s=0.001, max_s=0.01, jitter_ratio=0.0)
POLICY = LifePolicy(start_deadline_s=20.0, drain_deadline_s=1.0, back_off=FAST)


class Process:
    """An incarnation whose fate the test decides."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.pid = 1000 + epoch
        self.host = "here"
        self.told: list[str] = []
        self.obeys = True
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[str] = loop.create_future()
        self._end: asyncio.Future[str] = loop.create_future()

    def come_up(self) -> None:
        self._ready.set_result(f"here:{self.pid}")

    def refuse(self, why: str) -> None:
        self._ready.set_exception(SpawnError(why))

    def die(self, cause: str) -> None:
        if not self._end.done():
            self._end.set_result(cause)

    async def start(self) -> str:
        return await asyncio.shield(self._ready)

    async def ended(self) -> str:
        return await asyncio.shield(self._end)

    async def stop(self, deadline_s: float) -> None:
        self.told.append("stop")
        if self.obeys:
            self.die("stopped")

    async def kill(self) -> None:
        self.told.append("kill")
        self.die("killed")


class Yard:
    """Where a service's processes are made; hands each to the test."""

    def __init__(self) -> None:
        self.made: asyncio.Queue[Process] = asyncio.Queue()
        self.refusal: str | None = None

    async def spawn(self, epoch: Epoch) -> Incarnation:
        if self.refusal is not None:
            why, self.refusal = self.refusal, None
            raise SpawnError(why)
        process = Process(epoch)
        self.made.put_nowait(process)
        return process

    async def next(self) -> Process:
        async with asyncio.timeout(10):
            return await self.made.get()


class Told:
    """Every status the supervisor told, and waiting for one."""

    def __init__(self) -> None:
        self.all: list[ServiceStatus] = []
        self._news = asyncio.Event()

    def __call__(self, status: ServiceStatus) -> None:
        self.all.append(status)
        self._news.set()

    async def until(self, holds: Callable[[ServiceStatus], bool]) -> ServiceStatus:
        async with asyncio.timeout(10):
            while not (self.all and holds(self.all[-1])):
                self._news.clear()
                await self._news.wait()
        return self.all[-1]


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def told() -> Told:
    return Told()


@pytest.fixture
async def yard() -> Yard:
    return Yard()


@pytest.fixture
async def supervisor(store: MemoryStore, told: Told) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(StoreFencer(store, "c", announcement_s=60.0), MonotonicClock(), lambda: 0.0, told)
    yield supervisor
    await supervisor.stop(force=True)
    await supervisor.close()
    assert not supervisor.broken.done(), supervisor.broken.exception()
    assert len(asyncio.all_tasks()) == 1, "a task was left"


def spec(yard: Yard, policy: LifePolicy = POLICY) -> ServiceSpec:
    return ServiceSpec(WorkerId("p0"), Role.PREFILL, yard.spawn, policy)


async def test_a_crash_is_followed_by_a_fence_and_a_restart_under_a_new_epoch(
    supervisor: Supervisor, yard: Yard, told: Told, store: MemoryStore
) -> None:
    supervisor.add([spec(yard)])
    first = await yard.next()
    first.come_up()
    await supervisor.until_ready([WorkerId("p0")], 10.0)
    assert supervisor.status()[0].address == "here:1001"
    first.die("killed by SIGKILL")
    second = await yard.next()
    assert (first.epoch, second.epoch) == (1, 2)
    assert await store.get(epoch_key("c", WorkerId("p0"))) == b"2"
    record = WorkerRecord.model_validate_json(await store.get(worker_key("c", WorkerId("p0"))) or b"")
    assert (record.epoch, record.state, record.detail) == (
        2,
        WorkerState.STARTING,
        "to be restarted: killed by SIGKILL",
    )
    second.come_up()
    status = await told.until(lambda status: status.state is LifeState.READY)
    assert (status.restarts, status.failures, status.cause, status.pid) == (1, 1, "killed by SIGKILL", 1002)


async def test_refusals_are_told_and_tried_again(supervisor: Supervisor, yard: Yard, told: Told) -> None:
    supervisor.add([spec(yard)])
    process = await yard.next()
    process.refuse("out of memory")
    with pytest.raises(SpawnError, match=r"^p0: out of memory$"):
        await supervisor.until_ready([WorkerId("p0")], 10.0)
    assert process.told == ["kill"]
    yard.refusal = "no node"
    (await yard.next()).refuse("still no memory")
    await told.until(lambda status: status.cause == "no node")
    (await yard.next()).come_up()
    status = await told.until(lambda status: status.state is LifeState.READY)
    assert status.failures == 3


async def test_a_start_that_hangs_is_killed_and_replaced(supervisor: Supervisor, yard: Yard, told: Told) -> None:
    supervisor.add([spec(yard, LifePolicy(0.01, 1.0, FAST))])
    process = await yard.next()
    await told.until(lambda status: status.cause == "not ready within 0.01 s")
    replacement = await yard.next()
    assert process.told == ["kill"]
    assert replacement.epoch > process.epoch


async def test_until_ready_has_a_deadline(supervisor: Supervisor, yard: Yard) -> None:
    supervisor.add([spec(yard)])
    with pytest.raises(SpawnError, match=r"not ready within 0\.01 s: p0"):
        await supervisor.until_ready([WorkerId("p0")], 0.01)


async def test_stop_drains(supervisor: Supervisor, yard: Yard) -> None:
    supervisor.add([spec(yard)])
    process = await yard.next()
    process.come_up()
    await supervisor.until_ready([WorkerId("p0")], 10.0)
    await supervisor.stop()
    assert process.told == ["stop"]
    assert supervisor.status()[0].state is LifeState.STOPPED


async def test_what_does_not_drain_is_killed(supervisor: Supervisor, yard: Yard) -> None:
    supervisor.add([spec(yard, LifePolicy(10.0, 0.01, FAST, close_s=0.01))])
    process = await yard.next()
    process.obeys = False
    process.come_up()
    await supervisor.until_ready([WorkerId("p0")], 10.0)
    await supervisor.stop()
    assert process.told == ["stop", "kill"]
    assert supervisor.status()[0].state is LifeState.STOPPED


async def test_stop_before_it_is_up(supervisor: Supervisor, yard: Yard) -> None:
    supervisor.add([spec(yard)])
    process = await yard.next()
    await supervisor.stop()
    assert "kill" in process.told
    assert supervisor.status()[0].state is LifeState.STOPPED


async def test_restarts_go_on_without_the_store(supervisor: Supervisor, yard: Yard, store: MemoryStore) -> None:
    supervisor.add([spec(yard)])
    (await yard.next()).die("x")
    store.set_available(False)
    (await yard.next()).die("y")
    third = await yard.next()
    assert third.epoch == 3
    store.set_available(True)
    third.die("z")
    assert (await yard.next()).epoch == 4


async def test_epochs_never_repeat_when_the_store_forgets() -> None:
    store = MemoryStore()
    ledger = EpochLedger(store, "c")
    worker = WorkerId("w")
    assert [await ledger.draw(worker) for _ in range(3)] == [1, 2, 3]
    await store.delete(epoch_key("c", worker))
    assert [await ledger.draw(worker) for _ in range(2)] == [4, 5]
    assert await EpochLedger(store, "c").draw(worker) == 6  # another launcher goes on from the store


async def test_a_fence_never_overwrites_a_newer_record(store: MemoryStore) -> None:
    newer = WorkerRecord(worker_id=WorkerId("p0"), role=Role.PREFILL, epoch=Epoch(9), state=WorkerState.READY)
    await store.put(worker_key("c", WorkerId("p0")), newer.model_dump_json().encode())
    await StoreFencer(store, "c", announcement_s=1.0).fence(WorkerId("p0"), Role.PREFILL, "x")
    assert await store.get(worker_key("c", WorkerId("p0"))) == newer.model_dump_json().encode()
