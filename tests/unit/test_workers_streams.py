"""What the workers' shells share: outboxes, turns, timers, the table of requests, forgotten tasks."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from core.alarm import Alarm, Pacer
from core.clock import MonotonicClock
from core.errors import ProtocolError, WorkerLost
from core.gateway_streams import GatewayStreams
from core.ids import RequestId, TransferId
from core.request import PromptToken, RequestOutput
from core.request_table import RequestTable
from core.streams import Outbox, serve_stream
from core.task_set import TaskSet

DEADLINE_S = 10.0


async def drain(outbox: Outbox[str]) -> list[str]:
    outbox.close()
    return [item async for item in outbox]


async def test_an_outbox_gives_in_order_and_ends_when_closed() -> None:
    outbox = Outbox[str](10)
    taken: list[str] = []

    async def take() -> None:
        async for item in outbox:
            taken.append(item)

    taking = asyncio.create_task(take())
    outbox.put("a")
    await asyncio.sleep(0)
    outbox.put("b")
    outbox.close()
    outbox.put("too late")
    await asyncio.wait_for(taking, DEADLINE_S)
    assert taken == ["a", "b"]


async def test_an_outbox_that_nobody_reads_ends_with_an_error_instead_of_growing() -> None:
    outbox = Outbox[str](2)
    for item in "abc":
        outbox.put(item)
    with pytest.raises(ProtocolError, match="unread"):
        async for _ in outbox:
            pass
    assert outbox.is_closed


async def test_what_was_said_before_an_error_is_still_delivered() -> None:
    outbox = Outbox[str](2)
    outbox.put("last words")
    outbox.close(WorkerLost("gone"))
    items = aiter(outbox)
    assert await anext(items) == "last words"
    with pytest.raises(WorkerLost):
        await anext(items)


async def test_a_served_stream_ends_with_its_peer_and_passes_errors_on() -> None:
    commands: asyncio.Queue[str] = asyncio.Queue()
    outbox, sent = Outbox[str](10), list[str]()

    async def incoming() -> AsyncIterator[str]:
        while (command := await commands.get()) != "end":
            yield command

    async def send(item: str) -> None:
        sent.append(item)

    def on_command(command: str) -> None:
        if command == "bad":
            raise ProtocolError("bad")
        outbox.put(command.upper())

    commands.put_nowait("a")
    commands.put_nowait("end")
    async with asyncio.timeout(DEADLINE_S):
        await serve_stream(incoming(), send, outbox, on_command=on_command, encode=str)
    assert sent == ["A"]
    outbox = Outbox[str](10)
    commands.put_nowait("bad")
    with pytest.raises(ProtocolError):
        async with asyncio.timeout(DEADLINE_S):
            await serve_stream(incoming(), send, outbox, on_command=on_command, encode=str)


async def test_a_turn_says_what_precedes_then_one_batch_then_the_rest() -> None:
    streams = GatewayStreams[str](10, lambda outputs: "+".join(output.request_id for output in outputs))
    one, two = streams.connect(), streams.connect()
    streams.follow(one, "computed a")
    streams.output(one, RequestOutput(RequestId("a"), ()))
    streams.output(one, RequestOutput(RequestId("b"), ()))
    streams.precede(one, "landed b")
    streams.output(two, RequestOutput(RequestId("c"), ()))
    streams.flush()
    streams.flush()
    assert await drain(one) == ["landed b", "a+b", "computed a"]
    assert await drain(two) == ["c"]


async def test_scored_prompts_leave_in_messages_of_their_own_and_in_order() -> None:
    streams = GatewayStreams[str](10, lambda outputs: "+".join(output.request_id for output in outputs))
    stream, scored = streams.connect(), (PromptToken(1, None),)
    for name in "abCDef":
        streams.output(stream, RequestOutput(RequestId(name), (), None, scored if name.isupper() else ()))
    streams.follow(stream, "rest")
    streams.flush()
    assert await drain(stream) == ["a+b", "C", "D", "e+f", "rest"]


async def test_a_stream_that_is_gone_is_told_nothing() -> None:
    streams = GatewayStreams[str](10, lambda _: "batch")
    stream = streams.connect()
    streams.disconnect(stream)
    streams.follow(stream, "too late")
    streams.broadcast("to all")
    streams.flush()
    assert await drain(stream) == []
    assert len(streams) == 0


async def test_an_alarm_rings_once_for_the_deadline_it_was_last_given() -> None:
    clock, rung = MonotonicClock(), asyncio.Event()
    times = []

    def ring() -> None:
        times.append(clock.now())
        rung.set()

    alarm = Alarm(clock, ring)
    alarm.arm(clock.now() + 1000)
    due = clock.now() + 0.01
    alarm.arm(due)
    await asyncio.wait_for(rung.wait(), DEADLINE_S)
    assert [at >= due - 0.001 for at in times] == [True]
    alarm.arm(clock.now() + 1000)
    alarm.disarm()
    assert not alarm.is_armed


async def test_a_pacer_makes_one_call_of_many_and_none_is_lost() -> None:
    calls: list[float] = []
    clock, called = MonotonicClock(), asyncio.Event()

    def act() -> None:
        calls.append(clock.now())
        called.set()

    pacer = Pacer(clock, 0.02, act)
    for _ in range(2):
        for _ in range(5):
            pacer.ask()
        await asyncio.wait_for(called.wait(), DEADLINE_S)
        called.clear()
    assert len(calls) == 2
    assert calls[1] - calls[0] > 0.015
    pacer.close()


@dataclass
class _Machine:
    request_id: RequestId
    transfer_id: TransferId | None
    deadline: float | None = None

    def next_deadline(self) -> float | None:
        return self.deadline

    def check(self) -> None:
        pass


def test_the_table_finds_requests_by_id_transfer_stream_and_deadline() -> None:
    table = RequestTable[_Machine, str]()
    a = _Machine(RequestId("a"), TransferId("a/0"), 5.0)
    b = _Machine(RequestId("b"), None, 3.0)
    c = _Machine(RequestId("c"), TransferId("c/0"))
    for machine, stream in ((a, "x"), (b, "y"), (c, "x")):
        table.add(machine, stream)
    table.check()
    assert table.of_transfer(TransferId("c/0")) is c
    assert table.of_transfer(TransferId("b/0")) is None
    assert table.stream_of(b) == "y"
    stream = table.stream_of(a)
    assert table.of_stream(stream) == [a, c]
    assert table.next_deadline() == 3.0
    assert table.due(4.0) == [b]
    table.remove(b)
    table.remove(c)
    table.check()
    assert (list(table), table.next_deadline()) == ([a], 5.0)


async def test_tasks_that_fail_are_told_and_tasks_that_run_are_ended() -> None:
    errors: list[BaseException] = []
    tasks = TaskSet(errors.append)
    started = asyncio.Event()

    async def fail() -> None:
        raise ValueError("a defect")

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    failing = tasks.spawn(fail(), "fail")
    hanging = tasks.spawn(hang(), "hang")
    await asyncio.wait([failing])
    await started.wait()
    await tasks.close(DEADLINE_S)
    assert hanging.cancelled()
    assert [str(error) for error in errors] == ["a defect"]
