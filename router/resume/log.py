"""The events of one stream, in order, and those who read along.

Written by one, read by any number, each at its own pace from any event that is still kept. Memory is bounded by whoever
writes: `trim` drops events from the front.
"""

import asyncio
from collections.abc import Sequence

from core.errors import InvalidRequest, ServingError
from router.resume.events import EventsGone, LoggedEvent

_EVENTS_PER_TAKE = 1024


class EventLog:
    """Concurrency: the event loop's thread.

    Attributes:
        first_index: of the oldest event kept.
        num_bytes: of the events kept.
        error: how the stream failed; None: it did not.
    """

    def __init__(self, first_index: int = 0) -> None:
        self.first_index = first_index
        self.num_bytes = 0
        self.is_over = False
        self.error: ServingError | None = None
        self._events: list[bytes] = []
        self._followers: set[LogFollower] = set()
        self._is_told = False

    @property
    def next_index(self) -> int:
        return self.first_index + len(self._events)

    @property
    def num_followers(self) -> int:
        return len(self._followers)

    @property
    def is_delivered(self) -> bool:
        """Somebody took all of it, its end included."""
        return self._is_told

    def append(self, events: Sequence[bytes]) -> None:
        """Add events; whoever reads along is woken once."""
        assert not self.is_over, "nothing follows the end"
        self._events.extend(events)
        self.num_bytes += sum(map(len, events))
        self._wake()

    def end(self, error: ServingError | None) -> None:
        """Nothing follows. `error` is met by readers after all events."""
        assert not self.is_over, "it ends once"
        self.is_over = True
        self.error = error
        self._wake()

    def trim(self, max_bytes: int) -> None:
        """Drop the oldest events that a reader took, until `max_bytes` are kept or none is left that anybody took. A
        reader that lags behind the others is not waited for: it may be a dead connection's."""
        furthest = max((one.next_index for one in self._followers), default=self.first_index)
        count = 0
        while self.num_bytes > max_bytes and self.first_index + count < furthest:
            self.num_bytes -= len(self._events[count])
            count += 1
        del self._events[:count]
        self.first_index += count
        self._wake()

    def since(self, index: int, max_bytes: int) -> list[bytes]:
        """Return events from `index` on: at least one if there is one, else as many as `max_bytes` hold."""
        found: list[bytes] = []
        size = 0
        for position in range(index - self.first_index, len(self._events)):
            size += len(self._events[position])
            if found and size > max_bytes:
                break
            found.append(self._events[position])
        return found

    def follow(self, after: int | None, *, may_be_ahead: bool = False) -> "LogFollower":
        """Read what comes after event `after`; None: from the beginning. Whoever follows closes in the end.

        Args:
            may_be_ahead: `after` may be an event that has not come here, yet or at all.

        Raises:
            EventsGone: some of it is kept no longer.
            InvalidRequest: `after` is none of this stream's events.
        """
        first = 0 if after is None else after + 1
        if first < self.first_index:
            raise EventsGone(f"events {first} to {self.first_index - 1} are kept no longer")
        is_whole = self.is_over and self.error is None
        if first > self.next_index and (is_whole or not may_be_ahead):
            raise _no_such_event(first, self.next_index)
        follower = LogFollower(self, first)
        self._followers.add(follower)
        return follower

    def after(self, index: int) -> list[LoggedEvent]:
        """Return events from `index` on, as many as are taken at once."""
        start = index - self.first_index
        events = self._events[start : start + _EVENTS_PER_TAKE]
        return [LoggedEvent(index + offset, data) for offset, data in enumerate(events)]

    def told(self) -> None:
        """A reader met the end."""
        self._is_told = True

    def leave(self, follower: "LogFollower") -> None:
        """This reader has left. Idempotent."""
        self._followers.discard(follower)

    def _wake(self) -> None:
        for follower in self._followers:
            follower.changed.set()


class LogFollower:
    """One reader of a log."""

    def __init__(self, log: EventLog, next_index: int) -> None:
        self.changed = asyncio.Event()
        self.next_index = next_index
        self._log = log

    async def take(self) -> list[LoggedEvent]:
        """Wait for events, return some; none: that was the end. The writer sees to it that one comes.

        Raises:
            EventsGone: this reader was too slow.
            InvalidRequest: the stream ended before the event that this reader began after.
            ServingError: how the stream failed; everything before it was taken.
        """
        log = self._log
        while True:
            if self.next_index < log.first_index:
                raise EventsGone("the log of the stream is full, and other readers are further")
            if events := log.after(self.next_index):
                self.next_index += len(events)
                return events
            if log.is_over:
                log.told()
                if log.error is not None:
                    raise log.error.with_traceback(None)
                if self.next_index > log.next_index:
                    raise _no_such_event(self.next_index, log.next_index)
                return []
            self.changed.clear()
            await self.changed.wait()

    def close(self) -> None:
        """Idempotent."""
        self._log.leave(self)


def _no_such_event(first: int, num_events: int) -> InvalidRequest:
    return InvalidRequest("last_event_index", f"is {first - 1}, the stream has {num_events} events")
