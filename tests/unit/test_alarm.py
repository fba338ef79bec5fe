"""The alarm that many sessions share: it rings for the earliest, and once."""

import asyncio

from core.alarm import Alarm
from core.clock import ManualClock


async def test_an_alarm_for_many_rings_for_the_earliest() -> None:
    clock, rings = ManualClock(), asyncio.Queue[None]()
    alarm = Alarm(clock, lambda: rings.put_nowait(None))
    alarm.arm_by(None)
    assert not alarm.is_armed
    alarm.arm_by(3600.0)
    alarm.arm_by(0.0)
    alarm.arm_by(1800.0)  # later than what is armed: the callback arms the next
    async with asyncio.timeout(20):
        await rings.get()
    assert not alarm.is_armed


async def test_a_disarmed_alarm_does_not_ring() -> None:
    clock, rings = ManualClock(), asyncio.Queue[None]()
    alarm = Alarm(clock, lambda: rings.put_nowait(None))
    alarm.arm_by(0.0)
    assert alarm.is_armed
    alarm.disarm()
    is_past = asyncio.Event()
    asyncio.get_running_loop().call_later(0.0, is_past.set)  # behind where the ring would have been
    async with asyncio.timeout(20):
        await is_past.wait()
    assert rings.empty()
