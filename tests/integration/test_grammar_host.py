"""How the process that compiles constraints is started and missed."""

import asyncio
import os
import sys
from collections.abc import Iterator
from typing import ClassVar

import pytest
import uvloop

from core.clock import MonotonicClock
from core.errors import WorkerLost
from grammar.config import GrammarConfig
from grammar.host import GrammarHost
from tests.constrained import CHOICE, TOKENS

PATIENCE_S = 60.0


class Forks:
    """Ends every process that Python code runs in between fork and exec, as gRPC's threads sometimes do."""

    are_deadly: ClassVar[bool] = False

    @classmethod
    def end(cls) -> None:
        if cls.are_deadly:
            os._exit(1)


os.register_at_fork(after_in_child=Forks.end)


@pytest.fixture
def deadly_forks() -> Iterator[None]:
    Forks.are_deadly = True
    try:
        yield
    finally:
        Forks.are_deadly = False


async def check() -> None:
    host = GrammarHost(GrammarConfig(), TOKENS, MonotonicClock())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await host.check(CHOICE)
    finally:
        await host.close()


@pytest.mark.usefixtures("deadly_forks")
def test_nothing_of_ours_runs_between_fork_and_exec() -> None:
    """On the event loop of Ray's actors, in processes full of threads."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check())


async def test_a_server_that_ends_at_once_is_no_fault_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerLost, match="ended at its start, with status 1"):
        await check()
