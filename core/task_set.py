"""Tasks that a service starts and forgets, so that none outlives it and no failure of one is lost."""

import asyncio
from collections.abc import Callable, Coroutine


class TaskSet:
    """Running tasks of one service.

    Args:
        on_error: called on the event loop with what a task raised. Expected errors are caught inside a task; what
            arrives here is a defect.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self, deadline_s: float) -> None:
        """Cancel what is left and wait for it."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=deadline_s)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)
