"""A circuit breaker per worker: one that keeps losing work is left alone for a while, then tried with one request.

1. CLOSED: work is sent. Enough failures in a row trip it: OPEN. A failure is a lost or failed work, a missing answer or
   a broken stream, never a refusal: a busy worker is well.
2. OPEN: nothing is sent while it rests. The rest over: HALF_OPEN.
3. HALF_OPEN: one work is sent. It does well: CLOSED. It fails: OPEN, for twice as long. It is taken back (the client
   left, the worker was busy): another one may be sent.

What other gateways saw counts as evidence here (`adopt`), and is not told on. Pure but for the given generator; the
caller owns the time.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from core.ids import WorkerId
from router.forwarding.config import BreakerConfig


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerEvent(StrEnum):
    TRIPPED = "tripped"  # failures in a row, or the one of a probe; or another gateway says so
    RESTED = "rested"  # the rest is over
    PROVED = "proved"  # a work did well


B, E = BreakerState, BreakerEvent
EDGES: Mapping[BreakerState, Mapping[BreakerEvent, BreakerState]] = {
    B.CLOSED: {E.TRIPPED: B.OPEN, E.PROVED: B.CLOSED, E.RESTED: B.CLOSED},
    B.OPEN: {
        E.TRIPPED: B.OPEN,
        E.PROVED: B.OPEN,  # work from before; the rest goes on
        E.RESTED: B.HALF_OPEN,
    },
    B.HALF_OPEN: {E.PROVED: B.CLOSED, E.TRIPPED: B.OPEN, E.RESTED: B.HALF_OPEN},
}


@dataclass(slots=True)
class _Breaker:
    state: BreakerState = B.CLOSED
    num_failures: int = 0  # in a row
    num_trips: int = 0  # since it was last closed
    open_until: float = 0.0
    probe: str = ""  # the work that tries a half-open worker
    is_shut: bool = False  # as the gate was told


class CircuitBreakers:
    """The breakers of all workers; one that never failed costs nothing.

    Args:
        gate: told whenever a worker must not be sent work (True) or may again (False).

    Attributes:
        on_changed: told of every transition that this gateway itself observed.
    """

    def __init__(self, config: BreakerConfig, rng: random.Random, gate: Callable[[WorkerId, bool], None]) -> None:
        self._config = config
        self._rng = rng
        self._gate = gate
        self._breakers: dict[WorkerId, _Breaker] = {}
        self.on_changed: Callable[[WorkerId], None] | None = None

    def failed(self, worker_id: WorkerId, now: float) -> None:
        """A work was lost there, or nothing was answered."""
        breaker = self._breakers.setdefault(worker_id, _Breaker())
        breaker.num_failures += 1
        if breaker.state is B.HALF_OPEN or (
            breaker.state is B.CLOSED and breaker.num_failures >= self._config.failures
        ):
            self._rest(breaker, now)
            self._move(worker_id, breaker, E.TRIPPED)

    def proved(self, worker_id: WorkerId) -> None:
        """A work did well there."""
        breaker = self._breakers.get(worker_id)
        if breaker is not None and breaker.state is not B.OPEN:
            self._move(worker_id, breaker, E.PROVED)

    def sent(self, worker_id: WorkerId, work_id: str) -> None:
        """A work is on its way there. To a half-open worker it is the probe, and the only one."""
        breaker = self._breakers.get(worker_id)
        if breaker is not None and breaker.state is B.HALF_OPEN:
            breaker.probe = work_id
            self._tell_gate(worker_id, breaker)

    def withdrawn(self, worker_id: WorkerId, work_id: str) -> None:
        """The worker has nothing of the work any more, however it ended."""
        breaker = self._breakers.get(worker_id)
        if breaker is not None and breaker.probe == work_id:
            breaker.probe = ""
            self._tell_gate(worker_id, breaker)

    def forget(self, worker_id: WorkerId) -> None:
        """The worker left, or begins anew."""
        breaker = self._breakers.pop(worker_id, None)
        if breaker is not None and breaker.is_shut:
            self._gate(worker_id, False)

    def adopt(self, worker_id: WorkerId, state: BreakerState, open_for_s: float, now: float) -> None:
        """Take over what another gateway saw: a trip for as long as it says, or that the worker is well again."""
        if state is B.OPEN and open_for_s > 0:
            breaker = self._breakers.setdefault(worker_id, _Breaker())
            breaker.open_until = max(breaker.open_until, now + min(open_for_s, self._config.open_max_s))
            breaker.num_trips = max(1, breaker.num_trips)
            self._move(worker_id, breaker, E.TRIPPED, is_own=False)
        elif state is B.CLOSED and (known := self._breakers.get(worker_id)) is not None and known.state is not B.CLOSED:
            self._move(worker_id, known, E.RESTED, is_own=False)
            self._move(worker_id, known, E.PROVED, is_own=False)

    def poll(self, now: float) -> None:
        """Notice whose rest is over."""
        for worker_id, breaker in list(self._breakers.items()):
            if breaker.state is B.OPEN and now >= breaker.open_until:
                self._move(worker_id, breaker, E.RESTED)

    def next_deadline(self) -> float | None:
        """When `poll` has something to do."""
        return min((one.open_until for one in self._breakers.values() if one.state is B.OPEN), default=None)

    def state_of(self, worker_id: WorkerId, now: float) -> tuple[BreakerState, float]:
        """Return the state, and for how long it stays open."""
        breaker = self._breakers.get(worker_id)
        if breaker is None:
            return B.CLOSED, 0.0
        return breaker.state, max(0.0, breaker.open_until - now) if breaker.state is B.OPEN else 0.0

    def not_closed(self) -> Sequence[WorkerId]:
        """Return the workers that are not simply trusted now."""
        return [worker_id for worker_id, breaker in self._breakers.items() if breaker.state is not B.CLOSED]

    def check(self) -> None:
        """Assert what must hold between calls."""
        for breaker in self._breakers.values():
            assert breaker.is_shut is _must_shut(breaker)
            assert not breaker.probe or breaker.state is B.HALF_OPEN
            assert breaker.state is not B.CLOSED or breaker.num_failures < self._config.failures

    def _rest(self, breaker: _Breaker, now: float) -> None:
        longest_s = min(self._config.open_max_s, self._config.open_min_s * 2.0 ** min(breaker.num_trips, 32))
        breaker.open_until = now + longest_s * self._rng.uniform(0.5, 1.0)
        breaker.num_trips += 1

    def _move(self, worker_id: WorkerId, breaker: _Breaker, event: BreakerEvent, *, is_own: bool = True) -> None:
        before, breaker.state = breaker.state, EDGES[breaker.state][event]
        if breaker.state is not B.HALF_OPEN or before is not B.HALF_OPEN:
            breaker.probe = ""
        if breaker.state is B.CLOSED:
            del self._breakers[worker_id]  # as one that never failed
        self._tell_gate(worker_id, breaker)
        if is_own and before is not breaker.state and self.on_changed is not None:
            self.on_changed(worker_id)

    def _tell_gate(self, worker_id: WorkerId, breaker: _Breaker) -> None:
        if breaker.is_shut is not _must_shut(breaker):
            breaker.is_shut = not breaker.is_shut
            self._gate(worker_id, breaker.is_shut)


def _must_shut(breaker: _Breaker) -> bool:
    return breaker.state is B.OPEN or (breaker.state is B.HALF_OPEN and bool(breaker.probe))
