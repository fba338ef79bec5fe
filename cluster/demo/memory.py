"""Peak memory of a launch: of the launcher and of every process that carries its mark."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self

import psutil

from cluster.workspace import marked_processes

_PERIOD_S = 1.5  # reading the page tables of a dozen processes is not free


class MemoryWatch:
    """Context manager; samples on a thread while it is open.

    Attributes:
        peak_bytes: highest sum of proportional set sizes seen (resident ones, shared pages divided by their sharers).
        num_processes: at that moment.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._task: asyncio.Task[None] | None = None
        self.peak_bytes = 0
        self.num_processes = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._sample_for_ever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()  # a defect of ours

    async def _sample_for_ever(self) -> None:
        while True:
            num_bytes, count = await asyncio.to_thread(_measure, self._mark)
            if num_bytes > self.peak_bytes:
                self.peak_bytes, self.num_processes = num_bytes, count
            await asyncio.sleep(_PERIOD_S)


def _measure(mark: str) -> tuple[int, int]:
    total = count = 0
    for process in [psutil.Process(), *marked_processes(mark)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
            count += 1
    return total, count
