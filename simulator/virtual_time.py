"""An event loop whose clock jumps: when nothing is left to do now, it is the next timer's time at once.

The code under it is ordinary asyncio code (`call_later`, `sleep`, `timeout`), so the router runs unchanged, hours of it
in seconds. Whatever would wait for the world outside (a socket, a thread) never comes back, and is an error here."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StandstillError(RuntimeError):
    """Everybody waits and no timer is set: nothing will ever happen again."""


class _Jump(selectors.SelectSelector):
    """Where the loop would wait for input, virtual time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandstillError("every task waits and no timer is set")
        if timeout > 0:
            self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at second 0. Implements `core.clock.Clock` too."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s

    def now(self) -> float:
        return self._jump.now_s


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in a loop of its own.

    Raises:
        StandstillError: it can never end.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def virtual_loop() -> VirtualLoop:
    """Return the running loop, which must be a virtual one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop), "runs under run_virtual only"
    return loop
