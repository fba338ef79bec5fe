"""The log of a stream: every reader gets every event once and in order, or is told that it cannot."""

import asyncio
import random

import pytest

from core.errors import InvalidRequest, ServingError, WorkerLost
from router.resume.events import EventsGone, LoggedEvent
from router.resume.log import EventLog, LogFollower

PATIENCE_S = 5.0


def data(number: int) -> bytes:
    return f"event {number}".encode()


def filled(count: int) -> EventLog:
    log = EventLog()
    log.append([data(number) for number in range(count)])
    return log


async def drain(follower: LogFollower) -> list[LoggedEvent]:
    found: list[LoggedEvent] = []
    async with asyncio.timeout(PATIENCE_S):
        while events := await follower.take():
            found += events
    return found


def events(first: int, end: int) -> list[LoggedEvent]:
    return [LoggedEvent(number, data(number)) for number in range(first, end)]


async def test_readers_at_any_pace_from_anywhere() -> None:
    rng = random.Random(1)
    log = EventLog()
    readers: list[tuple[int | None, asyncio.Task[list[LoggedEvent]]]] = [
        (None, asyncio.create_task(drain(log.follow(None))))
    ]
    number = 0
    while number < 3000:
        count = rng.randint(0, 40)
        log.append([data(number + offset) for offset in range(count)])
        number += count
        if rng.random() < 0.3 and number:
            start = rng.randrange(number)
            readers.append((start, asyncio.create_task(drain(log.follow(start)))))
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    log.end(None)
    for after, reading in readers:
        assert await reading == events(0 if after is None else after + 1, number)
    assert log.is_delivered


async def test_it_tells_how_it_failed_after_all_events_to_everybody() -> None:
    log = filled(3)
    early = log.follow(None)
    log.end(WorkerLost("gone"))
    for follower in (early, log.follow(0), log.follow(2)):
        first = follower.next_index
        if first < 3:
            assert await follower.take() == events(first, 3)
        for _ in range(2):
            with pytest.raises(WorkerLost, match="gone"):
                await follower.take()


async def test_what_is_not_there_is_refused() -> None:
    log = filled(3)
    with pytest.raises(InvalidRequest, match="last_event_index: is 3, the stream has 3 events"):
        log.follow(3)


async def test_a_reader_may_be_ahead_of_a_copy() -> None:
    log = filled(2)
    ahead, beyond = log.follow(3, may_be_ahead=True), log.follow(9, may_be_ahead=True)
    reading, lost = asyncio.create_task(drain(ahead)), asyncio.create_task(drain(beyond))
    for number in range(2, 6):
        log.append([data(number)])
        await asyncio.sleep(0)
    log.end(None)
    assert await reading == events(4, 6)
    with pytest.raises(InvalidRequest):
        await lost
    with pytest.raises(InvalidRequest):
        log.follow(9, may_be_ahead=True)


async def test_trimming_drops_only_what_somebody_took() -> None:
    log = filled(10)
    log.trim(0)
    assert (log.first_index, log.next_index) == (0, 10), "nobody read any of it"
    fast, slow = log.follow(None), log.follow(None)
    assert await fast.take() == events(0, 10)
    log.append([data(number) for number in range(10, 20)])
    log.trim(0)
    assert log.first_index == 10, "not what the fastest has not seen"
    assert log.num_bytes == 10 * len(data(10))
    with pytest.raises(EventsGone):
        await slow.take()
    slow.close()
    with pytest.raises(EventsGone, match="events 5 to 9 are kept no longer"):
        log.follow(4)
    assert await fast.take() == events(10, 20)
    late = log.follow(14)
    assert await late.take() == events(15, 20)
    log.trim(len(data(10)) * 3)
    assert log.first_index == 17, "as little as needed"


async def test_leaving() -> None:
    log = filled(1)
    one, other = log.follow(None), log.follow(None)
    one.close()
    one.close()
    assert log.num_followers == 1
    other.close()
    assert log.num_followers == 0
    assert not log.is_delivered


def test_slices_for_the_mirror() -> None:
    log = filled(5)
    size = len(data(0))
    assert log.since(0, 2 * size) == [data(0), data(1)]
    assert log.since(3, 100 * size) == [data(3), data(4)]
    assert log.since(1, 1) == [data(1)], "at least one"
    assert log.since(5, 100) == []


def test_it_ends_once() -> None:
    log = filled(1)
    log.end(None)
    with pytest.raises(AssertionError):
        log.end(ServingError("again"))
    with pytest.raises(AssertionError):
        log.append([b""])
