"""The circuit breakers at work: the policy's table hears of each, one timer ends their rests, a restart closes one."""

import random
from collections.abc import Callable

from core.alarm import Alarm
from core.clock import Clock
from core.ids import WorkerId
from router.fleet import Fleet
from router.forwarding.breaker import CircuitBreakers
from router.forwarding.config import BreakerConfig


class BreakerWatch:
    """The breakers of one gateway.

    Args:
        on_rested: told when workers that had been left alone may be tried.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self, config: BreakerConfig, fleet: Fleet, clock: Clock, rng: random.Random, *, on_rested: Callable[[], None]
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._on_rested = on_rested
        self.breakers = CircuitBreakers(config, rng, self._gate)
        self._alarm = Alarm(clock, self._poll)
        fleet.table.on_reset.append(self._forget)

    def close(self) -> None:
        self._alarm.disarm()

    def _gate(self, worker_id: WorkerId, is_shut: bool) -> None:
        """Whoever saw why: a failure here, or another gateway, which may be gone before the rest is over."""
        self._fleet.table.set_breaker(worker_id, is_shut)
        self._alarm.arm(self.breakers.next_deadline())

    def _poll(self) -> None:
        self.breakers.poll(self._clock.now())
        self._alarm.arm(self.breakers.next_deadline())
        self._on_rested()

    def _forget(self, slot: int) -> None:
        """Another incarnation has the worker's row, or none."""
        worker_id = self._fleet.slots.worker(slot)
        if worker_id is not None:
            self.breakers.forget(worker_id)
