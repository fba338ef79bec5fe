"""Virtual time: timers in order, no waiting for the world."""

import asyncio
import time

import pytest

from simulator.virtual_time import StandstillError, run_virtual, virtual_loop
from simulator.wire import Wire


def test_an_hour_passes_at_once() -> None:
    async def main() -> list[float]:
        loop = virtual_loop()
        marks = [loop.now()]
        await asyncio.sleep(3600)
        marks.append(loop.now())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        marks.append(loop.now())
        return marks

    began = time.perf_counter()
    assert run_virtual(main()) == pytest.approx([0.0, 3600.0, 3605.0])
    assert time.perf_counter() - began < 3600


def test_tasks_interleave_by_their_timers() -> None:
    async def main() -> list[str]:
        said: list[str] = []

        async def say(name: str, every_s: float, times: int) -> None:
            for _ in range(times):
                await asyncio.sleep(every_s)
                said.append(name)

        await asyncio.gather(say("a", 2.0, 3), say("b", 3.5, 2))
        return said

    assert run_virtual(main()) == ["a", "b", "a", "a", "b"]


def test_waiting_for_nothing_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StandstillError):
        run_virtual(main())


def test_a_wire_keeps_the_order_even_of_simultaneous_messages() -> None:
    async def main() -> list[tuple[float, int]]:
        loop = virtual_loop()
        arrived: list[tuple[float, int]] = []
        wire: Wire[int] = Wire(loop, 0.5, lambda number: arrived.append((loop.now(), number)))
        for number in range(50):
            wire.send(number)
        await asyncio.sleep(0.25)
        wire.send(50)
        await asyncio.sleep(1)
        return arrived

    arrived = run_virtual(main())
    assert [number for _, number in arrived] == list(range(51))
    assert arrived[0][0] == pytest.approx(0.5)
    assert arrived[50][0] == pytest.approx(0.75)
