"""The inside of a process that runs one service: what the launcher's backend talks to. Knows no service and no Ray.

Life, called by the backend: `hello` (where am I), `run` (returns when the service has ended; the pending call that
breaks when the process dies), `start` (build and start the service on the seat that the launcher chose), `stop`.
Answers are plain values, never exceptions: what a foreign pickler makes of an exception is its own affair.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core.errors import ServingError

_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a process may run and be reached, decided by the launcher once it knows the node.

    Attributes:
        cores: to be pinned to; empty means not pinned.
        num_threads: for computing.
        host: address to bind to, that its peers can reach.
        environment: names and values for the libraries that the service loads; what is set already stays.
    """

    cores: frozenset[int]
    num_threads: int
    host: str
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What a process says of itself before it is given a seat. `node` tells nodes apart, `address` reaches one."""

    pid: int
    host: str
    cores: frozenset[int]
    node: str = ""
    address: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Started:
    """Either an address, or a problem in one line."""

    address: str = ""
    problem: str = ""


class Service(Protocol):
    """The room `service.py` of every service."""

    async def start(self) -> str: ...

    async def run(self) -> None: ...

    async def stop(self, deadline_s: float) -> None: ...


@runtime_checkable
class Drainable(Protocol):
    async def drain(self, deadline_s: float) -> None: ...


Factory = Callable[[Seat], Service]


class ServiceHost:
    """One per process."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._service: Service | None = None
        self._start_ended = asyncio.Event()

    async def hello(self) -> Whereabouts:
        return Whereabouts(os.getpid(), socket.gethostname(), frozenset(os.sched_getaffinity(0)))

    async def start(self, seat: Seat) -> Started:
        os.environ["OMP_NUM_THREADS"] = str(seat.num_threads)  # both are read when the factory loads torch, not before
        for name, value in seat.environment:
            os.environ.setdefault(name, value)
        if seat.cores:
            _pin(seat.cores)
        try:
            service = self._factory(seat)
            address = await service.start()
        except ServingError as error:
            return Started(problem=str(error))
        except OSError as error:
            return Started(problem=f"{type(error).__name__}: {error}")
        else:
            self._service = service
            return Started(address)
        finally:
            self._start_ended.set()

    async def run(self) -> str:
        """Return why the service ended."""
        await self._start_ended.wait()
        if self._service is None:
            return "failed to start"
        try:
            await self._service.run()
        except ServingError as error:
            return f"gave up: {error}"
        return "stopped"

    async def stop(self, deadline_s: float) -> None:
        """Finish what is running, for at most `deadline_s`, and end; `run` returns then."""
        if self._service is None:
            return
        if isinstance(self._service, Drainable):
            await self._service.drain(deadline_s)
            deadline_s = _CLOSE_S  # whatever is still there has had its time
        await self._service.stop(deadline_s)


def _pin(cores: frozenset[int]) -> None:
    """Pin every thread there is; later ones inherit it from the thread that makes them."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue  # it ended meanwhile
