"""What this gateway's resumable streams have to tell, written to the shared store for the other gateways.

Paced: one write per `mirror_interval_s` with what all streams have to tell, however many events that is. A store that
was away is told the same again, one that forgot a stream all of it; readers know an event by its number. Streams that
rest are written to now and then, so that their leases do not end.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import StoreUnavailable
from core.store import LeasedAppend, Store
from router.resume.codec import Batch, StreamOrigin, batch_to_bytes
from router.resume.config import ResumeConfig
from router.resume.log import EventLog
from router.resume.metrics import ResumeMetrics

_log = logging.getLogger(__name__)
_BATCH_BYTES = 256 * 1024
_WRITE_BYTES = 4 * 2**20  # of one step of the store
_MAX_ENTRIES = 1_000_000  # bytes are bounded by the log
_TTL_MARGIN_S = 15.0  # an entry keeps the stream so much longer than its window
_TOUCH_S = 5.0


@dataclass(slots=True, eq=False)
class Mirrored:
    """A stream, and how far its mirror is.

    Attributes:
        is_known: the store has it, or cannot be told now.
    """

    name: str
    origin: StreamOrigin
    log: EventLog
    is_known: asyncio.Event = field(default_factory=asyncio.Event)
    next_number: int | None = None  # None: nothing was written
    is_end_written: bool = False
    is_cut: bool = False
    num_bytes: int = 0
    written_at: float = 0.0

    def begin_again(self) -> None:
        """The store lost it."""
        self.next_number = None
        self.is_end_written = self.is_cut = False


@dataclass(frozen=True, slots=True)
class _Step:
    """One batch of a stream, to be written."""

    stream: Mirrored
    batch: Batch


class Mirror:
    """Writes. Concurrency: the event loop's thread; `run` is one task."""

    def __init__(self, store: Store, clock: Clock, config: ResumeConfig, metrics: ResumeMetrics) -> None:
        self._store = store
        self._clock = clock
        self._config = config
        self._metrics = metrics
        self._streams: set[Mirrored] = set()
        self._dirty: dict[Mirrored, None] = {}
        self._dropped: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._num_bytes = 0  # of all streams
        self._is_store_away = False

    def add(self, stream: Mirrored) -> None:
        """Write this stream from now on."""
        self._streams.add(stream)
        self._dropped.pop(stream.name, None)
        if self._is_store_away:
            stream.is_known.set()
        self.note(stream)

    def note(self, stream: Mirrored) -> None:
        """It has news."""
        self._dirty[stream] = None
        self._changed.set()

    def drop(self, stream: Mirrored) -> None:
        """Remove it from the store, unless another one has its name by now."""
        self._streams.discard(stream)
        self._dirty.pop(stream, None)
        self._count(stream, 0)
        if not any(one.name == stream.name for one in self._streams):
            self._dropped[stream.name] = None
            self._changed.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TOUCH_S):
                    await self._changed.wait()
            pause_s = self._config.mirror_interval_s
            if not await self.flush():
                pause_s = self._config.retry_interval_s
            await asyncio.sleep(pause_s)

    async def flush(self) -> bool:
        """Write what there is to tell. Returns whether the store was there."""
        async with self._writing:
            self._changed.clear()
            self._touch()
            try:
                while steps := self._steps():
                    await self._write(steps)
                for name in list(self._dropped):
                    await self._store.delete(name)
                    self._dropped.pop(name, None)
            except StoreUnavailable as error:
                _log.debug("resumable streams are not mirrored: %s", error)
                self._metrics.mirror_failed()
                self._dropped.clear()  # their leases end
                self._is_store_away = True
                for stream in self._streams:
                    stream.is_known.set()
                self._changed.set()
                return False
            self._is_store_away = False
        return True

    def _touch(self) -> None:
        now = self._clock.now()
        for stream in self._streams:
            if now - stream.written_at >= _TOUCH_S:
                self._dirty[stream] = None

    def _steps(self) -> list[_Step]:
        """Return the next batches of the streams that have news, as many as one write may have."""
        steps: list[_Step] = []
        size = 0
        for stream in list(self._dirty):
            if size >= _WRITE_BYTES:
                break
            step = self._step(stream, self._config.max_mirror_bytes - self._num_bytes - size)
            steps.append(step)
            size += sum(map(len, step.batch.events))
        return steps

    def _step(self, stream: Mirrored, room_bytes: int) -> _Step:
        log = stream.log
        is_first = stream.next_number is None
        number = log.first_index if stream.next_number is None else stream.next_number
        if number < log.first_index:  # trimmed before it was written: only its own gateway can go on
            stream.is_cut = True
        if stream.is_cut:
            return _Step(stream, Batch(stream.origin, number, is_cut=True, is_first=is_first))
        events = tuple(log.since(number, _BATCH_BYTES))
        size = sum(map(len, events))
        if stream.num_bytes + size > self._config.max_stream_bytes or size > room_bytes:
            return _Step(stream, Batch(stream.origin, number, is_cut=True, is_first=is_first))
        is_last = log.is_over and number + len(events) == log.next_index
        error = log.error if is_last else None
        return _Step(stream, Batch(stream.origin, number, events, is_last, error, is_first=is_first))

    async def _write(self, steps: list[_Step]) -> None:
        appends = [
            LeasedAppend(
                step.stream.name,
                batch_to_bytes(step.batch),
                step.stream.origin.window_s + _TTL_MARGIN_S,
                _MAX_ENTRIES,
                is_first=step.batch.is_first,
            )
            for step in steps
        ]
        now = self._clock.now()
        for step, is_done in zip(steps, await self._store.append_leased(appends), strict=True):
            if is_done:
                self._wrote(step, now)
            else:
                step.stream.begin_again()  # and it stays among those with news
                self._count(step.stream, 0)

    def _wrote(self, step: _Step, now: float) -> None:
        stream, batch = step.stream, step.batch
        stream.written_at = now
        stream.next_number = batch.first_number + len(batch.events)
        self._count(stream, stream.num_bytes + sum(map(len, batch.events)))
        stream.is_end_written = stream.is_end_written or batch.is_over
        stream.is_cut = stream.is_cut or batch.is_cut
        stream.is_known.set()
        log = stream.log
        has_more = stream.next_number < log.next_index or (log.is_over and not stream.is_end_written)
        if not has_more or stream.is_cut:
            self._dirty.pop(stream, None)

    def _count(self, stream: Mirrored, num_bytes: int) -> None:
        """The store has so much of a stream now."""
        self._num_bytes += num_bytes - stream.num_bytes
        stream.num_bytes = num_bytes
