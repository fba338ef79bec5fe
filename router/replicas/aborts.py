"""Aborting a request wherever it runs: a gateway that does not have it asks the others, and waits for their answers.

A question goes out with every message until it is settled, so one that was lost is asked again; each gateway answers
each question once and remembers what it said. It is settled as soon as one has found the request, or none has: every
gateway that was known answered, or fell silent, which ended its requests with it.

Pure: news come in, what is to be told comes out; `Round.settled` is for whoever waits.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.ids import GatewayId
from router.replicas.news import AbortAnswer, AbortAsk

_MAX_ANSWERED = 4096  # questions whose answers are remembered


@dataclass(slots=True, eq=False)
class Round:
    """One question of this gateway. `waiting_for`: those who have not answered."""

    ask: AbortAsk
    waiting_for: set[GatewayId]
    settled: asyncio.Event
    is_found: bool = False


class AbortRounds:
    """Of one gateway.

    Args:
        abort_here: aborts a tenant's request if it runs here; returns whether it did.
    """

    def __init__(self, abort_here: Callable[[str, str], bool]) -> None:
        self._abort_here = abort_here
        self._open: dict[str, Round] = {}
        self._answered: dict[str, bool] = {}
        self._to_tell: dict[str, AbortAnswer] = {}
        self._has_new = False

    @property
    def is_empty(self) -> bool:
        """There is nothing new to tell."""
        return not (self._has_new or self._to_tell)

    def begin(self, ask: AbortAsk, peers: Iterable[GatewayId]) -> Round:
        """Ask. To be ended by `end`."""
        opened = self._open[ask.ask_id] = Round(ask, set(peers), asyncio.Event())
        self._has_new = True
        self._settle(opened)
        return opened

    def end(self, opened: Round) -> None:
        """Ask no more."""
        self._open.pop(opened.ask.ask_id, None)

    def asks(self) -> tuple[AbortAsk, ...]:
        """Return the questions that are open, for the next message."""
        self._has_new = False
        return tuple(one.ask for one in self._open.values())

    def answers(self) -> tuple[AbortAnswer, ...]:
        """Return the answers for the next message, which is the only one that has them."""
        told, self._to_tell = tuple(self._to_tell.values()), {}
        return told

    def absorb(self, gateway: GatewayId, asks: Iterable[AbortAsk], answers: Iterable[AbortAnswer]) -> None:
        """Take in what another gateway said."""
        for ask in asks:
            found = self._answered.get(ask.ask_id)
            if found is None:
                found = self._answered[ask.ask_id] = self._abort_here(ask.request_id, ask.tenant)
                if len(self._answered) > _MAX_ANSWERED:
                    del self._answered[next(iter(self._answered))]
            self._to_tell[ask.ask_id] = AbortAnswer(ask.ask_id, found)
        for answer in answers:
            opened = self._open.get(answer.ask_id)
            if opened is not None:
                opened.is_found = opened.is_found or answer.found
                opened.waiting_for.discard(gateway)
                self._settle(opened)

    def note_peers(self, peers: frozenset[GatewayId]) -> None:
        """These are all that are left."""
        for opened in self._open.values():
            opened.waiting_for &= peers
            self._settle(opened)

    def _settle(self, opened: Round) -> None:
        if opened.is_found or not opened.waiting_for:
            opened.settled.set()
