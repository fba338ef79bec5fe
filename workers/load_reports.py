"""What a worker says of its load: soon after it changed, with every answer to a submission, and as a heartbeat.

Every report that leaves carries the next number of one sequence, so that of two reports a reader knows the newer one. A
gateway sees gaps in it: an answer goes to one gateway alone.
"""

from collections.abc import Callable

from core.alarm import Alarm, Pacer
from core.clock import Clock
from core.membership import LoadReport


class LoadReports:
    """Numbers the reports of one worker and lets them be said.

    Args:
        measure: the load now; None while there is none to tell of.
        say: tells everybody.
        interval_s: between two tellings, at least.
        heartbeat_s: between two tellings, at most, whether anything has changed or not.

    Concurrency: the event loop's thread only.
    """

    def __init__(
        self,
        clock: Clock,
        measure: Callable[[], LoadReport | None],
        say: Callable[[LoadReport], None],
        *,
        interval_s: float,
        heartbeat_s: float,
    ) -> None:
        self._clock = clock
        self._measure = measure
        self._say = say
        self._heartbeat_s = heartbeat_s
        self._sequence = 0
        self._told: LoadReport | None = None  # without its number
        self._pacer = Pacer(clock, interval_s, self._tell_change)
        self._heartbeat = Alarm(clock, self.tell)

    def number(self, load: LoadReport) -> LoadReport:
        """Return the report as it may be sent."""
        self._sequence += 1
        return load.model_copy(update={"sequence": self._sequence})

    def ask(self) -> None:
        """The load may have changed."""
        self._pacer.ask()

    def tell(self) -> None:
        """Tell everybody now."""
        load = self._measure()
        if load is not None:
            self._told = load
            self._say(self.number(load))
            self._heartbeat.arm(self._clock.now() + self._heartbeat_s)

    def close(self) -> None:
        self._pacer.close()
        self._heartbeat.disarm()

    def _tell_change(self) -> None:
        if self._measure() != self._told:
            self.tell()
