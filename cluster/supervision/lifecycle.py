"""The life of one supervised service (a worker, the gateway, the embedded Redis), over all its incarnations. Pure.

1. PENDING: wanted; its first epoch is being drawn.      5. FAILED: dead; a new epoch is drawn, which fences the old.
2. STARTING: a process was asked for and loads.          6. BACKING_OFF: waits, then STARTING again.
3. READY: it serves.                                     7. DRAINING: told to finish and leave, on the way to
4. (it dies: FAILED)                                     8. STOPPED.

The supervisor feeds events and performs the effects that `handle` returns. Events that belong to an incarnation carry
its epoch; `handle` drops those of an older one before they reach the table. Time is an argument and randomness a
callable; the shell arms one timer at `next_deadline` and feeds `expired(now)` when it fires.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cluster.supervision.backoff import BackOffConfig, restart_delay_s
from core.errors import InvalidTransition
from core.ids import Epoch


class LifeState(StrEnum):
    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"
    BACKING_OFF = "backing_off"


# Events


@dataclass(frozen=True, slots=True)
class StartAsked:
    """Desired state wants the service."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """A new epoch was drawn and announced: nothing of an older one is valid from here on."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class BecameReady:
    epoch: Epoch
    address: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The incarnation's process is gone, or was never made. `cause` is one line for people."""

    epoch: Epoch
    cause: str


@dataclass(frozen=True, slots=True)
class StartOverdue:
    """The start deadline passed."""


@dataclass(frozen=True, slots=True)
class RestartDue:
    """The back-off is over."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Desired state no longer wants the service."""


@dataclass(frozen=True, slots=True)
class DrainOverdue:
    """The time for draining and closing passed."""


Event = StartAsked | Fenced | BecameReady | Ended | StartOverdue | RestartDue | StopAsked | DrainOverdue


# Effects


@dataclass(frozen=True, slots=True)
class Fence:
    """Draw the next epoch, announce it, answer with `Fenced`. The cause is that of the end before; empty at first."""

    cause: str


@dataclass(frozen=True, slots=True)
class Start:
    """Make a process of this epoch; answer with `BecameReady` or `Ended`."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Drain:
    """Ask it to finish and leave; answer with `Ended`."""

    deadline_s: float


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process by force; `Ended` follows."""

    cause: str


Effect = Fence | Start | Drain | Kill


S = LifeState
EDGES: Mapping[LifeState, Mapping[type[Event], LifeState]] = {
    S.PENDING: {
        StartAsked: S.PENDING,  # the epoch is drawn first
        Fenced: S.STARTING,
        StopAsked: S.STOPPED,
    },
    S.STARTING: {
        BecameReady: S.READY,
        Ended: S.FAILED,  # bad configuration, out of memory, no place in the cluster
        StartOverdue: S.FAILED,  # hangs while loading
        StopAsked: S.DRAINING,  # nothing to finish: killed
    },
    S.READY: {
        Ended: S.FAILED,  # crashed, was killed, or gave up on a fatal error
        StopAsked: S.DRAINING,
    },
    S.FAILED: {
        Fenced: S.BACKING_OFF,
        Ended: S.FAILED,  # the process killed by StartOverdue is gone now
        BecameReady: S.FAILED,  # ready just after StartOverdue; it is being killed
        StopAsked: S.STOPPED,
    },
    S.BACKING_OFF: {
        RestartDue: S.STARTING,
        StopAsked: S.STOPPED,
    },
    S.DRAINING: {
        Ended: S.STOPPED,
        BecameReady: S.DRAINING,  # came up between the wish to stop and the kill
        DrainOverdue: S.DRAINING,  # killed; Ended follows
        StopAsked: S.DRAINING,
    },
    S.STOPPED: {
        StopAsked: S.STOPPED,
        Ended: S.STOPPED,  # late news of a process killed by StartOverdue
        BecameReady: S.STOPPED,  # the same
        Fenced: S.STOPPED,  # was drawn while the wish to stop arrived
    },
}


@dataclass(frozen=True, slots=True)
class LifePolicy:
    """Deadlines of one service. Past draining it has `close_s` to close everything before it is killed."""

    start_deadline_s: float
    drain_deadline_s: float
    back_off: BackOffConfig
    close_s: float = 6.0


class ServiceLife:
    """The machine. `state`, `epoch`, `address`, `cause` and `failures` are for reading only."""

    def __init__(self, name: str, policy: LifePolicy, unit_random: Callable[[], float]) -> None:
        self.name = name
        self.state = S.PENDING
        self.epoch = Epoch(0)
        self.address = ""
        self.cause = ""  # of the last failure
        self.failures = 0  # in a row
        self.restarts = 0
        self._policy = policy
        self._unit_random = unit_random
        self._ready_at: float | None = None
        self._deadline: float | None = None

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one step.

        Raises:
            InvalidTransition: no such edge; nothing changed.
        """
        if isinstance(event, BecameReady | Ended) and event.epoch < self.epoch:
            return []  # of an incarnation that is fenced already
        before = self.state
        after = EDGES[before].get(type(event))
        if after is None:
            raise InvalidTransition(f"life of {self.name}", before, event)
        self.state = after
        if after is not before:
            self._deadline = None
        return self._effects(before, event, now)

    def next_deadline(self) -> float | None:
        """When `expired` will have an event, if nothing happens before."""
        return self._deadline

    def expired(self, now: float) -> StartOverdue | RestartDue | DrainOverdue | None:
        """Return the timer event that is due, if any. The caller feeds it to `handle`."""
        if self._deadline is None or now < self._deadline:
            return None
        match self.state:
            case S.STARTING:
                return StartOverdue()
            case S.BACKING_OFF:
                return RestartDue()
            case _:
                return DrainOverdue()

    @property
    def is_crash_loop(self) -> bool:
        """Too many failures in a row: the cause deserves a person's eye; restarts go on at the slowest pace."""
        return self.failures >= self._policy.back_off.crash_loop_failures

    def check(self) -> None:
        """Assert what must hold between any two events."""
        timed = self.state in (S.STARTING, S.BACKING_OFF, S.DRAINING)
        assert timed or self._deadline is None, (self.state, self._deadline)
        assert self.state in (S.DRAINING, S.STOPPED) or (self.address != "") == (self.state is S.READY), self.state
        assert self.epoch > 0 or self.state in (S.PENDING, S.STOPPED), self.state
        assert self.failures == 0 or self.cause, "a failure without a cause"

    def _effects(self, before: LifeState, event: Event, now: float) -> list[Effect]:
        match event:
            case StartAsked():
                return [Fence("")]
            case Fenced(epoch):
                return self._fenced(epoch, now)
            case RestartDue():
                self.restarts += 1
                return self._start(now)
            case BecameReady(_, address):
                if self.state is S.READY:
                    self.address, self._ready_at = address, now
                return []
            case Ended(_, cause):
                self.address = ""
                return self._failed(cause, now) if before in (S.STARTING, S.READY) else []
            case StartOverdue():
                cause = f"not ready within {self._policy.start_deadline_s:g} s"
                return [Kill(cause), *self._failed(cause, now)]
            case StopAsked():
                return self._stop(before, now)
            case DrainOverdue():
                self._deadline = None
                return [Kill(f"did not stop within {self._policy.drain_deadline_s + self._policy.close_s:g} s")]

    def _fenced(self, epoch: Epoch, now: float) -> list[Effect]:
        self.epoch = epoch
        if self.state is S.STARTING:
            return self._start(now)
        if self.state is S.BACKING_OFF:
            self._deadline = now + restart_delay_s(self._policy.back_off, self.failures, self._unit_random())
        return []

    def _start(self, now: float) -> list[Effect]:
        self._deadline = now + self._policy.start_deadline_s
        return [Start(self.epoch)]

    def _failed(self, cause: str, now: float) -> list[Effect]:
        was_stable = self._ready_at is not None and now - self._ready_at >= self._policy.back_off.stable_s
        self.failures = 1 if was_stable else self.failures + 1
        self.cause, self._ready_at = cause, None
        return [Fence(cause)]

    def _stop(self, before: LifeState, now: float) -> list[Effect]:
        if self.state is not S.DRAINING or before is S.DRAINING:
            return []
        self._deadline = now + self._policy.drain_deadline_s + self._policy.close_s
        return [Kill("stopped while starting")] if before is S.STARTING else [Drain(self._policy.drain_deadline_s)]
