"""The port between the supervisor and whatever makes processes: Ray actors, a subprocess, or a fake in tests."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.supervision.lifecycle import LifePolicy
from core.errors import ServingError
from core.ids import Epoch, WorkerId


class SpawnError(ServingError):
    """A process could not be made, or died or gave up while it was starting. The message is the cause."""


class Incarnation(Protocol):
    """One process of one service.

    Life: `spawn` returns it with the process alive; `start` once; then `ended` is awaited until it returns; `stop` and
    `kill` at any time, any number of times. The process holds nothing any more when `ended` has returned.
    """

    pid: int
    host: str

    async def start(self) -> str:
        """Load and begin to serve; returns host:port.

        Raises:
            SpawnError: it failed; the process may still be there and must be killed.
        """
        ...

    async def ended(self) -> str:
        """Wait for the end of the process, and return its cause in one line."""
        ...

    async def stop(self, deadline_s: float) -> None:
        """Ask it to finish what it has and leave. Returns at once or soon; `ended` tells when it has."""
        ...

    async def kill(self) -> None:
        """End it by force, now."""
        ...


Spawn = Callable[[Epoch], Awaitable[Incarnation]]
"""Makes a process of that epoch. Raises SpawnError with nothing left behind."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """What the supervisor must know of a service.

    Attributes:
        name: unique in the cluster; the worker id.
        kind: prefill, decode, gateway, redis: for people.
    """

    name: WorkerId
    kind: str
    spawn: Spawn
    policy: LifePolicy
