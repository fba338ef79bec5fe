"""Who may ask the cluster now: those whose turn it is in the queue, and late-bound prompts that there may be room for.

Whatever may have changed that (an answer, an end, a worker that came, a load) asks for a pass, and one pass of the
event loop later `run` feeds those whose turn it is, however many asked.
"""

import asyncio
from collections.abc import Callable

from core.alarm import Alarm
from core.clock import Clock
from router import messages as m
from router.admission.queue import AdmissionQueue
from router.forwarding.late_bound import LateBound
from router.in_flight import ActiveRequest, InFlight
from router.metrics import GatewayMetrics


class Turns:
    """Of one gateway.

    Args:
        feed: gives an event to the machine of a request.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        queue: AdmissionQueue,
        late_bound: LateBound,
        requests: InFlight,
        clock: Clock,
        metrics: GatewayMetrics,
        *,
        feed: Callable[[ActiveRequest, m.Event], None],
    ) -> None:
        self._queue = queue
        self._late_bound = late_bound
        self._requests = requests
        self._clock = clock
        self._metrics = metrics
        self._feed = feed
        self._is_due = False
        self._alarm = Alarm(clock, self.run)

    def soon(self) -> None:
        """Those who wait may have their turn now."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self.run)

    def note_room(self) -> None:
        """There may be room at a decode worker."""
        self._late_bound.note_room()
        self.soon()

    def note_capacity(self) -> None:
        """Something was freed, or a worker joined: there may be room at any."""
        self._queue.note_capacity(self._clock.now())
        self.note_room()

    def run(self) -> None:
        """Feed those whose turn it is."""
        self._is_due = False
        seeker = self._late_bound.take_turn()
        if seeker is not None:
            self._feed(seeker, m.SeekDue())
        for request_id in self._queue.take(self._clock.now()):
            self._feed(self._requests.queued(request_id), m.Released())
        self._alarm.arm(self._queue.next_deadline())
        self._metrics.queued.set(len(self._queue))

    def close(self) -> None:
        self._alarm.disarm()
