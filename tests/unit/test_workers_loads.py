"""When a worker tells its load, and how the reports are numbered."""

import asyncio

from core.clock import ManualClock
from core.membership import LoadReport
from workers.load_reports import LoadReports

NEVER_S = 3600.0


class Told:
    """A worker whose load a test sets; what it tells is waited for."""

    def __init__(self, *, interval_s: float = 0.0, heartbeat_s: float = NEVER_S) -> None:
        self.load: LoadReport | None = LoadReport(num_running=1)
        self.heard = asyncio.Queue[LoadReport]()
        self.reports = LoadReports(
            ManualClock(), lambda: self.load, self.heard.put_nowait, interval_s=interval_s, heartbeat_s=heartbeat_s
        )

    async def next(self) -> LoadReport:
        async with asyncio.timeout(20):
            return await self.heard.get()


async def test_a_change_is_told_and_what_has_not_changed_is_not() -> None:
    it = Told()
    it.reports.tell()
    assert await it.next() == LoadReport(sequence=1, num_running=1)
    it.reports.ask()  # nothing new
    it.load = None
    it.reports.tell()  # nothing to tell of
    it.load = LoadReport(num_running=2)
    it.reports.ask()
    assert await it.next() == LoadReport(sequence=2, num_running=2)
    assert it.heard.empty()
    it.reports.close()


async def test_a_heartbeat_tells_what_has_not_changed() -> None:
    it = Told(heartbeat_s=0.001)
    it.reports.tell()
    told = [await it.next() for _ in range(3)]
    it.reports.close()
    assert [load.sequence for load in told] == [1, 2, 3]
    assert {load.num_running for load in told} == {1}


async def test_every_report_that_leaves_has_the_next_number() -> None:
    it = Told()
    it.reports.tell()
    answer = it.reports.number(LoadReport(num_running=7))
    it.reports.tell()
    assert answer == LoadReport(sequence=2, num_running=7)
    assert [(await it.next()).sequence for _ in range(2)] == [1, 3]
    it.reports.close()


async def test_nothing_is_told_after_the_end() -> None:
    it = Told(heartbeat_s=0.0001)
    it.reports.tell()
    it.load = LoadReport(num_running=3)
    it.reports.ask()
    it.reports.close()
    is_past = asyncio.Event()
    asyncio.get_running_loop().call_later(0.001, is_past.set)
    await is_past.wait()
    assert it.heard.qsize() == 1
