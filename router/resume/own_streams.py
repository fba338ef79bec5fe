"""The resumable streams of this gateway: read to their end by tasks of their own, logged, aborted when nobody reads.

The shell of `router.resume.lifecycle`. Bounds hold for all streams together: what is over and was read makes room, then
what the readers of a growing stream have taken already; what still does not fit fails its request, because events that
nobody has seen are never dropped, and a worker that generates cannot be made to wait.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from core.alarm import Alarm
from core.clock import Clock
from core.errors import Aborted, RejectedError, RejectReason, ServingError, SlowReader, StoreUnavailable
from core.store import Store
from core.task_set import TaskSet
from router.resume import lifecycle as life
from router.resume.codec import StreamOrigin, reader_key
from router.resume.config import ResumeConfig
from router.resume.events import LoggedEvent, StreamKey, StreamKind
from router.resume.lifecycle import StreamLife, StreamState
from router.resume.log import EventLog, LogFollower
from router.resume.metrics import ResumeMetrics
from router.resume.mirror import Mirror, Mirrored
from router.resume.port import Batches

_log = logging.getLogger(__name__)
_ANNOUNCE_S = 0.25  # the first event waits so long for the store to know of the stream
_ROOM_RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class _Stream:
    key: StreamKey
    mirrored: Mirrored
    life: StreamLife
    abort: Callable[[ServingError], None]
    alarm: Alarm
    num_bytes: int = 0  # as counted in the total
    is_kept: bool = True

    @property
    def log(self) -> EventLog:
        return self.mirrored.log


class OwnFollower:
    """A reader of a stream of this gateway."""

    def __init__(self, kind: StreamKind, follower: LogFollower, on_close: Callable[[], None]) -> None:
        self.kind = kind
        self._follower = follower
        self._on_close = on_close
        self._is_open = True

    async def take(self) -> list[LoggedEvent]:
        """As `router.resume.port.Follower.take`."""
        return await self._follower.take()

    def close(self) -> None:
        """Idempotent."""
        if self._is_open:
            self._is_open = False
            self._follower.close()
            self._on_close()


class OwnStreams:
    """Keeps them.

    Args:
        other_bytes: kept of other gateways' streams.

    Concurrency: the event loop's thread.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        config: ResumeConfig,
        mirror: Mirror,
        metrics: ResumeMetrics,
        *,
        other_bytes: Callable[[], int],
    ) -> None:
        self._store = store
        self._clock = clock
        self._config = config
        self._mirror = mirror
        self._metrics = metrics
        self._other_bytes = other_bytes
        self._streams: dict[StreamKey, _Stream] = {}
        self._num_bytes = 0
        self._reading: set[asyncio.Task[None]] = set()
        self._tasks = TaskSet(lambda error: _log.error("the task of a resumable stream failed", exc_info=error))

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._streams

    @property
    def num_bytes(self) -> int:
        """Of their events, and of those of other gateways."""
        return self._num_bytes + self._other_bytes()

    @property
    def has_room(self) -> bool:
        return self.num_bytes <= self._config.max_total_bytes

    def check_room(self) -> None:
        """Raises: RejectedError, QUEUE_FULL: no further stream can be kept."""
        if len(self._streams) >= self._config.max_streams and not self._make_room():
            bound = f"{self._config.max_streams} resumable streams are kept"
            raise RejectedError(RejectReason.QUEUE_FULL, bound, _ROOM_RETRY_S)

    def open(
        self,
        key: StreamKey,
        name: str,
        origin: StreamOrigin,
        batches: Batches,
        abort: Callable[[ServingError], None],
    ) -> OwnFollower:
        """Keep a call's stream from now on. Returns its first reader.

        Args:
            name: of the mirror.
            abort: fails the call; `batches` then raises this error.
        """
        if (old := self._streams.get(key)) is not None:
            self._forget(old, "replaced")  # its request is over: no two in flight have one id
        mirrored = Mirrored(name, origin, EventLog())
        stream = _Stream(
            key,
            mirrored,
            StreamLife(origin.window_s),
            abort,
            Alarm(self._clock, lambda: self._on_window_over(stream)),
        )
        self._streams[key] = stream
        self._mirror.add(mirrored)
        follower = self._follower(stream, None)
        task = self._tasks.spawn(self._read(stream, batches), name=f"resumable {key.request_id}")
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        self._metrics.begun()
        self._tell_metrics()
        return follower

    def follow(self, key: StreamKey, after: int | None) -> OwnFollower:
        """Read one on. Raises: EventsGone, InvalidRequest."""
        return self._follower(self._streams[key], after)

    async def finish(self, deadline_s: float) -> None:
        """Wait until all calls have been read to their ends, and their ends are written to the store."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                if self._reading:
                    await asyncio.wait(set(self._reading))
                await self._mirror.flush()

    async def close(self, deadline_s: float) -> None:
        """Keep nothing here. What the store has stays there for its time."""
        await self._tasks.close(deadline_s)
        for stream in self._streams.values():
            stream.alarm.disarm()
            stream.is_kept = False
        self._streams.clear()

    async def _read(self, stream: _Stream, batches: Batches) -> None:
        error: ServingError | None = ServingError("the stream broke off")
        try:
            async with aclosing(batches):
                async for events in batches:
                    await self._announced(stream)
                    self._append(stream, events)
            error = None
        except ServingError as failure:
            error = failure
        except asyncio.CancelledError:
            error = Aborted("the gateway is stopping")
            raise
        finally:
            stream.log.end(error)
            if stream.is_kept:
                self._mirror.note(stream.mirrored)
                self._handle(stream, life.Ended())

    async def _announced(self, stream: _Stream) -> None:
        """Wait until other gateways can find the stream: a client that has seen any of it may go there."""
        if not stream.mirrored.is_known.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANNOUNCE_S):
                    await stream.mirrored.is_known.wait()

    def _append(self, stream: _Stream, events: Sequence[bytes]) -> None:
        log, largest = stream.log, self._config.max_stream_bytes
        log.append(events)
        if not stream.is_kept:
            return
        if log.num_bytes > largest:
            log.trim(largest * 3 // 4)
        self._count(stream)
        while not self.has_room and self._make_room():
            pass
        if not self.has_room:
            log.trim(0)
            self._count(stream)
        if log.num_bytes > largest:
            self._handle(stream, life.Overflowed(f"more than {largest} bytes of the resumable stream are unread"))
        elif not self.has_room:
            self._handle(stream, life.Overflowed("the gateway has no room for what is unread of its streams"))
        self._mirror.note(stream.mirrored)

    def _follower(self, stream: _Stream, after: int | None) -> OwnFollower:
        log = stream.log
        reading = log.follow(after)

        def left() -> None:
            if stream.is_kept and not log.num_followers:
                self._handle(stream, life.LastFollowerLeft())

        self._handle(stream, life.FollowerCame())
        return OwnFollower(stream.mirrored.origin.kind, reading, left)

    def _on_window_over(self, stream: _Stream) -> None:
        if stream.life.state is StreamState.KEPT:
            self._handle(stream, life.WindowLapsed())
        else:
            self._tasks.spawn(self._ask_elsewhere(stream), name=f"readers of {stream.key.request_id}")

    async def _ask_elsewhere(self, stream: _Stream) -> None:
        """Find out whether another gateway has a reader of a stream that has none here."""
        asked_at = stream.life.next_deadline()
        event: life.Event
        try:
            is_read = await self._store.get(reader_key(stream.mirrored.name)) is not None
            event = life.ReadElsewhere() if is_read else life.WindowLapsed()
        except StoreUnavailable:
            event = life.StoreSilent()
        if stream.is_kept and stream.life.state is StreamState.ALONE and stream.life.next_deadline() == asked_at:
            self._handle(stream, event)  # else somebody came, or it ended, meanwhile

    def _handle(self, stream: _Stream, event: life.Event) -> None:
        effects = stream.life.handle(event, self._clock.now())
        stream.alarm.arm(stream.life.next_deadline())
        for effect in effects:
            match effect:
                case life.AbortUnread(cause):
                    self._metrics.unread()
                    stream.abort(Aborted(cause))
                case life.AbortOverflowed(cause):
                    stream.abort(SlowReader(cause))
                case life.Forget(cause):
                    self._forget(stream, cause)

    def _forget(self, stream: _Stream, cause: str) -> None:
        del self._streams[stream.key]
        stream.is_kept = False
        stream.alarm.disarm()
        self._num_bytes -= stream.num_bytes
        self._mirror.drop(stream.mirrored)
        self._metrics.forgotten(cause)
        self._tell_metrics()

    def _make_room(self) -> bool:
        """Forget the oldest stream that is over and was read to its end. Returns whether there was one."""
        for stream in self._streams.values():
            if stream.life.state is StreamState.KEPT and stream.log.is_delivered:
                self._handle(stream, life.RoomNeeded())
                return True
        return False

    def _count(self, stream: _Stream) -> None:
        self._num_bytes += stream.log.num_bytes - stream.num_bytes
        stream.num_bytes = stream.log.num_bytes
        self._tell_metrics()

    def _tell_metrics(self) -> None:
        self._metrics.kept(len(self._streams), self._num_bytes)
