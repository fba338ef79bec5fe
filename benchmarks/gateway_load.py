"""The load of the benchmark of gateways, in a process of its own: so many streams at a time, each followed by the next
as soon as it ended, until told otherwise."""

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import uvloop

from benchmarks.gateway_wires import GrpcWire, HttpWire, Seen, Totals

Protocol = Literal["grpc", "http"]
STREAMS_PER_CONNECTION = 8  # over gRPC; HTTP/1.1 has one
_PROMPT = "Say something about gateways, and take your time."
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Order:
    """What to do.

    Attributes:
        addresses: host:port, connections go to them in turn.
        max_tokens: of an answer.
        is_traced: when which token came is kept.
        spread_s: the first streams begin within so long.
    """

    protocol: Protocol
    addresses: tuple[str, ...]
    num_streams: int
    max_tokens: int
    is_traced: bool = False
    spread_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Told:
    """What was seen up to now. `streams`: (request id, time asked, time of the first token, [(time, tokens)])."""

    at: float
    num_tokens: int
    num_events: int
    num_done: int
    errors: tuple[str, ...]
    streams: tuple[tuple[str, float, float, list[tuple[float, int]]], ...] = ()


class _Load:
    """One order, as it is carried out."""

    def __init__(self, order: Order, name: str) -> None:
        self._order = order
        self._name = name
        self._numbers = itertools.count()
        self._totals = Totals()
        self._wires: list[HttpWire | GrpcWire] = []
        self._is_ending = False
        self._num_open = 0
        self._all_over = asyncio.Event()

    async def start(self) -> None:
        order, loop = self._order, asyncio.get_running_loop()
        per_connection = STREAMS_PER_CONNECTION if order.protocol == "grpc" else 1
        asks: list[int] = []
        for number in range(-(-order.num_streams // per_connection)):
            address = order.addresses[number % len(order.addresses)]
            host, _, port = address.rpartition(":")
            slot = len(self._wires)
            _, wire = await loop.create_connection(partial(self._wire, slot, address), host, int(port))
            self._wires.append(wire)
            asks += [slot] * min(per_connection, order.num_streams - len(asks))
        for place, slot in enumerate(asks):
            loop.call_later(order.spread_s * place / len(asks), self._ask, slot)

    def _wire(self, slot: int, address: str) -> HttpWire | GrpcWire:
        kind = GrpcWire if self._order.protocol == "grpc" else HttpWire
        return kind(self._totals, lambda _seen: self._ended(slot), address)

    def told(self) -> Told:
        totals = self._totals
        return Told(
            time.monotonic(), totals.num_tokens, totals.num_events, totals.num_done, tuple(sorted(set(totals.errors)))
        )

    async def end(self) -> Told:
        """Return everything; streams that are traced may finish first, others are left."""
        self._is_ending = True
        if self._num_open and self._order.is_traced:
            async with asyncio.timeout(_DRAIN_S):
                await self._all_over.wait()
        totals = self._totals
        streams = tuple((one.request_id, one.asked_at, one.first_at, one.events or []) for one in totals.streams)
        for wire in self._wires:
            if wire.transport is not None:
                wire.transport.abort()
        return Told(
            time.monotonic(), totals.num_tokens, totals.num_events, totals.num_done, tuple(sorted(set(totals.errors))),
            streams,
        )  # fmt: skip

    def _ask(self, slot: int) -> None:
        if self._is_ending:
            return
        order = self._order
        seen = Seen(f"{self._name}-{next(self._numbers)}", time.monotonic(), [] if order.is_traced else None)
        if order.is_traced:
            self._totals.streams.append(seen)
        self._num_open += 1
        self._wires[slot].ask(seen, _PROMPT, order.max_tokens)

    def _ended(self, slot: int) -> None:
        self._num_open -= 1
        if self._num_open == 0 and self._is_ending:
            self._all_over.set()
        if len(self._totals.errors) < 100:  # a gateway that refuses everything is not asked for ever
            asyncio.get_running_loop().call_soon(self._ask, slot)


def serve(pipe: Connection) -> None:
    """Obey: ("start", Order), ("look", None) -> Told, ("end", None) -> Told, ("stop", None)."""
    uvloop.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    load: _Load | None = None
    names = itertools.count()
    news: asyncio.Queue[Sequence[Any]] = asyncio.Queue()
    loop.add_reader(pipe.fileno(), lambda: news.put_nowait(pipe.recv()))
    os.set_blocking(pipe.fileno(), True)  # the loop has changed that, and long answers must go through whole
    pipe.send("ready")
    while True:
        what, value = await news.get()
        if what == "start":
            load = _Load(value, f"load{next(names)}")
            await load.start()
            pipe.send("started")
        elif what == "look":
            assert load is not None
            pipe.send(load.told())
        elif what == "end":
            assert load is not None
            pipe.send(await load.end())
        else:
            return
