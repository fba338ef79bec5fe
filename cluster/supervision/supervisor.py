"""Keeps services alive: observes their processes, lets the machine of `lifecycle` decide, performs its effects.

One `ServiceLife` per service. Every observation (a process came up, ended, a timer) becomes an event; `_feed` is the
only place that steps a machine, and every effect runs as a task of its own whose outcome is the next event. One timer
is armed, at the earliest deadline of all machines.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.supervision.incarnation import Incarnation, ServiceSpec, SpawnError
from cluster.supervision.lifecycle import (
    BecameReady,
    Drain,
    Effect,
    Ended,
    Event,
    Fence,
    Fenced,
    Kill,
    LifeState,
    ServiceLife,
    Start,
    StartAsked,
    StopAsked,
)
from core.alarm import Alarm
from core.clock import Clock
from core.ids import Epoch, WorkerId

_KILL_S = 6.0  # from SIGKILL to the news of the end


class Fencer(Protocol):
    """Draws epochs and makes them known."""

    async def fence(self, service: WorkerId, kind: str, cause: str) -> Epoch:
        """Return a new epoch; every reader of the cluster now refuses the older ones. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A frozen look at one service, for people and for decisions."""

    name: WorkerId
    kind: str
    state: LifeState
    epoch: Epoch
    address: str
    pid: int
    restarts: int
    failures: int
    cause: str
    is_crash_loop: bool


class Supervisor:
    """Concurrency: made and used on one event loop; its tasks all end with `stop` or `close`.

    Attributes:
        broken: fails with the exception of a task of ours that should never raise: a defect, and the owner's cue to
            take everything down. Otherwise it stays pending.
    """

    def __init__(
        self,
        fencer: Fencer,
        clock: Clock,
        unit_random: Callable[[], float],
        on_change: Callable[[ServiceStatus], None] = lambda status: None,
    ) -> None:
        self._fencer = fencer
        self._clock = clock
        self._unit_random = unit_random
        self._on_change = on_change
        self._specs: dict[WorkerId, ServiceSpec] = {}
        self._lives: dict[WorkerId, ServiceLife] = {}
        self._incarnations: dict[WorkerId, Incarnation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm = Alarm(clock, self._ring)
        self._changed = asyncio.Condition()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, specs: Sequence[ServiceSpec]) -> None:
        """Begin to supervise: each service is started at once."""
        for spec in specs:
            assert spec.name not in self._specs, f"{spec.name} is supervised already"
            self._specs[spec.name] = spec
            self._lives[spec.name] = ServiceLife(spec.name, spec.policy, self._unit_random)
            self._feed(spec.name, StartAsked())

    def status(self) -> list[ServiceStatus]:
        return [self._status_of(name) for name in self._specs]

    async def until_ready(self, names: Sequence[WorkerId], deadline_s: float) -> None:
        """Wait until all of `names` are ready at the same time.

        Raises:
            SpawnError: one of them failed (the first cause), or the deadline passed. Nothing is stopped here.
        """
        lives = [self._lives[name] for name in names]

        def settled() -> bool:
            return any(life.failures for life in lives) or all(life.state is LifeState.READY for life in lives)

        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(settled)
        except TimeoutError:
            late = ", ".join(life.name for life in lives if life.state is not LifeState.READY)
            raise SpawnError(f"not ready within {deadline_s:g} s: {late}") from None
        for life in lives:
            if life.failures:
                raise SpawnError(f"{life.name}: {life.cause}")

    async def stop(self, names: Sequence[WorkerId] | None = None, *, force: bool = False) -> None:
        """Drain and end `names` (default all), waiting at most for their drain deadlines and a few seconds of grace.

        Args:
            force: kill, without draining.
        """
        names = list(self._specs) if names is None else names
        for name in names:
            self._feed(name, StopAsked())
            if force:
                self._perform(self._specs[name], Kill("forced stop"))
        policies = [self._specs[name].policy for name in names]
        longest_s = 0.0 if force else max((p.drain_deadline_s + p.close_s for p in policies), default=0.0)
        try:
            async with asyncio.timeout(longest_s + _KILL_S), self._changed:
                await self._changed.wait_for(
                    lambda: all(self._lives[name].state is LifeState.STOPPED for name in names)
                )
        except TimeoutError:
            pass  # a process that survives SIGKILL: the backend's own end takes it along
        if all(life.state is LifeState.STOPPED for life in self._lives.values()):
            await self._end_tasks()

    async def close(self) -> None:
        """Forget everything, with no word to the processes. For the end, after `stop`."""
        await self._end_tasks()

    def _feed(self, name: WorkerId, event: Event) -> None:
        life = self._lives[name]
        for effect in life.handle(event, self._clock.now()):
            self._perform(self._specs[name], effect)
        life.check()
        self._arm()
        self._on_change(self._status_of(name))
        self._spawn_task(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _perform(self, spec: ServiceSpec, effect: Effect) -> None:
        match effect:
            case Fence(cause):
                self._spawn_task(self._fence(spec, cause))
            case Start(epoch):
                self._spawn_task(self._run(spec, epoch))
            case Drain(deadline_s):
                self._on_incarnation(spec.name, lambda process: process.stop(deadline_s))
            case Kill():
                self._on_incarnation(spec.name, lambda process: process.kill())

    def _on_incarnation(self, name: WorkerId, act: Callable[[Incarnation], Coroutine[None, None, None]]) -> None:
        process = self._incarnations.get(name)
        if process is not None:  # else it is still being made: `_run` sees the changed state
            self._spawn_task(act(process))

    async def _fence(self, spec: ServiceSpec, cause: str) -> None:
        epoch = await self._fencer.fence(spec.name, spec.kind, cause)
        self._feed(spec.name, Fenced(epoch))

    async def _run(self, spec: ServiceSpec, epoch: Epoch) -> None:
        """One incarnation from spawn to end."""
        try:
            process = await spec.spawn(epoch)
        except SpawnError as error:
            self._feed(spec.name, Ended(epoch, str(error)))
            return
        self._incarnations[spec.name] = process
        life = self._lives[spec.name]
        if life.state is not LifeState.STARTING or life.epoch != epoch:
            await process.kill()  # unwanted by now
        failures: list[str] = []
        starting = asyncio.create_task(self._start(spec, epoch, process, failures))
        try:
            cause = await process.ended()
        finally:
            starting.cancel()
            await asyncio.wait([starting])
        if not starting.cancelled():
            starting.result()  # a defect in it is ours
        if self._incarnations.get(spec.name) is process:
            del self._incarnations[spec.name]
        self._feed(spec.name, Ended(epoch, next(iter(failures), cause)))

    async def _start(self, spec: ServiceSpec, epoch: Epoch, process: Incarnation, failures: list[str]) -> None:
        """Bring it up; a failure is noted before the kill, because the death that follows hides it."""
        try:
            address = await process.start()
        except SpawnError as error:
            failures.append(str(error))
            await process.kill()
            return
        self._feed(spec.name, BecameReady(epoch, address))

    def _ring(self) -> None:
        for name, life in self._lives.items():
            event = life.expired(self._clock.now())
            if event is not None:
                self._feed(name, event)
        self._arm()

    def _arm(self) -> None:
        self._alarm.arm(
            min((at for life in self._lives.values() if (at := life.next_deadline()) is not None), default=None)
        )

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.broken.done():
            self.broken.set_exception(error)

    async def _end_tasks(self) -> None:
        self._alarm.disarm()
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _status_of(self, name: WorkerId) -> ServiceStatus:
        life, process = self._lives[name], self._incarnations.get(name)
        return ServiceStatus(
            name=name,
            kind=self._specs[name].kind,
            state=life.state,
            epoch=life.epoch,
            address=life.address,
            pid=process.pid if process is not None else 0,
            restarts=life.restarts,
            failures=life.failures,
            cause=life.cause,
            is_crash_loop=life.is_crash_loop,
        )
