"""Turns of reading: in order, a few at a time, with room for other things between."""

import asyncio

from router.reading_turns import Bell, ReadingTurns

PATIENCE_S = 10.0


async def test_readers_wake_in_order_a_few_at_a_time_and_other_things_happen_between() -> None:
    turns, seen = ReadingTurns(at_a_time=2), list[str]()
    bells = [Bell(turns) for _ in range(5)]

    async def read(number: int) -> None:
        await bells[number].wait()
        seen.append(str(number))

    def other() -> None:
        seen.append("other")
        if len(seen) < 12:
            asyncio.get_running_loop().call_soon(other)

    readers = [asyncio.create_task(read(number)) for number in range(5)]
    await asyncio.sleep(0)
    for number in (3, 0, 4, 1, 2):
        bells[number].ring()
    asyncio.get_running_loop().call_soon(other)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*readers)
    assert [one for one in seen if one != "other"] == ["3", "0", "4", "1", "2"]
    first, second = seen.index("0"), seen.index("4")
    third, fourth = seen.index("1"), seen.index("2")
    assert "other" in seen[first:second]
    assert "other" in seen[third:fourth]


async def test_several_rings_before_the_reader_wakes_are_one() -> None:
    bell = Bell(ReadingTurns())
    bell.ring()
    await asyncio.sleep(0)
    bell.ring()
    await bell.wait()
    again = asyncio.create_task(bell.wait())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not again.done()
    bell.ring()
    async with asyncio.timeout(PATIENCE_S):
        await again


async def test_a_reader_that_went_away_leaves_the_turn_to_the_next() -> None:
    turns = ReadingTurns(at_a_time=1)
    gone, other = Bell(turns), Bell(turns)
    leaving, staying = asyncio.create_task(gone.wait()), asyncio.create_task(other.wait())
    await asyncio.sleep(0)
    gone.ring()
    other.ring()
    leaving.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await staying
    assert leaving.cancelled()
    async with asyncio.timeout(PATIENCE_S):
        await gone.wait()  # what it rang for is still to be read
