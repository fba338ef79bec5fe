"""A gateway's verdicts on constraints: asked before a request takes a place anywhere, remembered, bounded."""

import asyncio
from collections import OrderedDict
from hashlib import sha256

from core.clock import Clock
from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from grammar import bounds
from grammar.config import GrammarConfig
from grammar.host import GrammarHost, ModelTokens, TooSlow

_DOUBT_S = 60.0  # a constraint that was too slow may be tried again after so long

_Name = tuple[ConstraintKind, bytes]
"""Of a constraint: its kind and its text's hash. Thousands of verdicts are kept, and no text of strangers with them."""


class GrammarService:
    """Says whether a constraint can be enforced.

    A verdict is remembered; requests that ask for the same one at the same time wait for the same compilation, which
    goes on when one of them gives up. Whoever has no constraint never comes here.

    Concurrency: event loop.
    """

    def __init__(self, config: GrammarConfig, tokens: ModelTokens, clock: Clock) -> None:
        self._config = config
        self._host = GrammarHost(config, tokens, clock)
        self._verdicts: OrderedDict[_Name, asyncio.Task[InvalidRequest | None]] = OrderedDict()

    async def check(self, constraint: Constraint) -> None:
        """Return when workers will be able to enforce it.

        Raises:
            InvalidRequest: it is malformed, cannot be enforced, or costs too much; names the field.
            RejectedError: QUEUE_FULL, too many wait for a verdict. WorkerLost: there is no verdict now.
        """
        bounds.check(constraint, self._config.limits)
        name = _name_of(constraint)
        task = self._verdicts.get(name)
        if task is None:
            task = asyncio.create_task(self._judge(constraint), name="verdict on a constraint")
            self._verdicts[name] = task
            task.add_done_callback(lambda done: self._settle(name, done))
        self._verdicts.move_to_end(name)
        refusal = await asyncio.shield(task)
        if refusal is not None:
            raise InvalidRequest(refusal.field, refusal.problem)

    async def close(self) -> None:
        """End the processes. Idempotent."""
        await self._host.close()
        tasks = [task for task in self._verdicts.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _judge(self, constraint: Constraint) -> InvalidRequest | None:
        try:
            await self._host.check(constraint)
        except InvalidRequest as refusal:
            return type(refusal)(refusal.field, refusal.problem)  # the raised one holds the constraint
        return None

    def _settle(self, name: _Name, done: asyncio.Task[InvalidRequest | None]) -> None:
        """Forget what is no verdict, and the verdicts that were not asked for longest."""
        if done.cancelled() or done.exception() is not None:
            self._verdicts.pop(name, None)
        elif isinstance(done.result(), TooSlow):
            asyncio.get_running_loop().call_later(_DOUBT_S, self._verdicts.pop, name, None)
        known = [one for one, task in self._verdicts.items() if task.done()]
        for one in known[: max(0, len(known) - self._config.max_verdicts)]:
            del self._verdicts[one]


def _name_of(constraint: Constraint) -> _Name:
    return constraint.kind, sha256(constraint.text.encode()).digest()
