"""A worker's grammars, ready to be followed: one process each, shared by all requests with the same constraint."""

import asyncio
from collections import OrderedDict

from core.clock import Clock
from core.constraint import Constraint
from grammar import bounds
from grammar.config import GrammarConfig
from grammar.host import GrammarHost, ModelTokens
from grammar.walk import Grammar


class GrammarLibrary:
    """Compiles what is asked for, and keeps what was used last.

    A grammar that is dropped from here lives on as long as a request holds it.

    Concurrency: event loop.
    """

    def __init__(self, config: GrammarConfig, tokens: ModelTokens, clock: Clock) -> None:
        self._config = config
        self._host = GrammarHost(config, tokens, clock)
        self._grammars: OrderedDict[Constraint, asyncio.Task[Grammar]] = OrderedDict()

    async def get(self, constraint: Constraint) -> Grammar:
        """Return the grammar; several who ask at once wait for the same compilation.

        Raises:
            InvalidRequest: it cannot be enforced, or costs too much.
            RejectedError: too many are being compiled. WorkerLost: it cannot be compiled now.
        """
        task = self._grammars.get(constraint)
        if task is None or (task.done() and task.result().error is not None):
            bounds.check(constraint, self._config.limits)
            task = asyncio.create_task(self._host.open(constraint), name="grammar")
            self._grammars[constraint] = task
            task.add_done_callback(lambda done: self._settle(constraint, done))
        self._grammars.move_to_end(constraint)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End all processes; requests that still follow a grammar fail. Idempotent."""
        tasks = [task for task in self._grammars.values() if not task.done()]
        await self._host.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._grammars.clear()

    def _settle(self, constraint: Constraint, done: asyncio.Task[Grammar]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._grammars.pop(constraint, None)
        ready = [one for one, task in self._grammars.items() if task.done()]
        for one in ready[: max(0, len(ready) - self._config.max_grammars)]:
            del self._grammars[one]
