"""Streams of other gateways, read from their mirrors in the shared store for clients that came here.

One copy per stream, however many clients read it here; one reading of the store for all copies. A copy ends with its
stream; or when its gateway has fallen silent and all that it had saved is here; or when the store stays away. While
somebody reads a copy, a lease in the store says so, and its gateway keeps the request going.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.clock import Clock
from core.errors import (
    ProtocolError,
    RejectedError,
    RejectReason,
    RequestNotFound,
    ServingError,
    StoreUnavailable,
)
from core.ids import GatewayId
from core.store import STREAM_START, Store, StreamEntry
from router.resume.codec import Batch, StreamOrigin, batch_from_bytes, reader_key
from router.resume.config import ResumeConfig
from router.resume.events import EventsGone, GatewayGone
from router.resume.log import EventLog, LogFollower

_log = logging.getLogger(__name__)
_ENTRIES_PER_READ = 256
_WAIT_S = 0.1  # a copy that is new joins the next reading
_LEASE_INTERVAL_S = 1.0
_OPENED_AT_ONCE = 4  # what is being opened is a whole stream that counts nowhere yet
_ROOM_RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class _Copy:
    name: str
    origin: StreamOrigin
    log: EventLog
    cursor: str
    alive_at: float  # when its gateway was known to live
    store_at: float  # when the store answered last
    is_store_away: bool = False
    leased_at: float = float("-inf")


class CopyFollower:
    """A client that reads a copy."""

    def __init__(self, copies: "Copies", copy: _Copy, follower: LogFollower) -> None:
        self.origin = copy.origin
        self._copies = copies
        self._copy = copy
        self._follower = follower
        self.take = follower.take

    def close(self) -> None:
        """Idempotent."""
        self._follower.close()
        self._copies.let_go(self._copy)


class Copies:
    """What is read here of other gateways' streams.

    Args:
        is_alive: whether a gateway has been heard lately.
        patience_s: a gateway that is not heard for so long after its stream was opened here, or after it fell silent,
            is gone.
        has_room: whether more events may be kept.

    Concurrency: the event loop's thread; `run` is one task.
    """

    def __init__(
        self,
        store: Store,
        gateway_id: GatewayId,
        clock: Clock,
        config: ResumeConfig,
        *,
        is_alive: Callable[[GatewayId], bool],
        patience_s: float,
        has_room: Callable[[], bool],
    ) -> None:
        self._store = store
        self._gateway_id = gateway_id
        self._clock = clock
        self._config = config
        self._is_alive = is_alive
        self._patience_s = patience_s
        self._has_room = has_room
        self._copies: dict[str, _Copy] = {}
        self._came = asyncio.Event()
        self._opening = asyncio.Semaphore(_OPENED_AT_ONCE)

    @property
    def num_bytes(self) -> int:
        return sum(copy.log.num_bytes for copy in self._copies.values())

    def __len__(self) -> int:
        return len(self._copies)

    async def follow(self, name: str, after: int | None) -> CopyFollower:
        """Read a stream from its mirror.

        Raises:
            RequestNotFound: there is none.
            EventsGone, InvalidRequest: it does not hold what comes after `after`.
            StoreUnavailable: whether there is one cannot be told.
            RejectedError: QUEUE_FULL, no room for one more.
        """
        async with self._opening:
            if not self._has_room():
                raise RejectedError(RejectReason.QUEUE_FULL, "no room for streams of other gateways", _ROOM_RETRY_S)
            return self._follow(name, await self._open(name), after)

    def _follow(self, name: str, copy: _Copy, after: int | None) -> CopyFollower:
        """Read a copy just made, or the one that is there already."""
        running = self._copies.get(name)
        if running is not None and not running.log.is_over:
            if running.origin == copy.origin:
                copy = running
            else:  # another request has the name by now
                _end(running, _replaced())
        self._copies[name] = copy
        try:
            follower = copy.log.follow(after, may_be_ahead=True)  # the mirror lags behind
        finally:
            self.let_go(copy)
        self._came.set()
        return CopyFollower(self, copy, follower)

    def let_go(self, copy: _Copy) -> None:
        """A reader left."""
        if not copy.log.num_followers and self._copies.get(copy.name) is copy:
            del self._copies[copy.name]

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            if not self._copies:
                self._came.clear()
                await self._came.wait()
            await self._read()
            await self._say_read()
            for copy in list(self._copies.values()):
                self._check(copy)
            await asyncio.sleep(self._config.mirror_interval_s / 2)

    def close(self, error: ServingError) -> None:
        """End all copies."""
        for copy in self._copies.values():
            _end(copy, error)

    async def _open(self, name: str) -> _Copy:
        now = self._clock.now()
        copy: _Copy | None = None
        cursor = STREAM_START
        while True:
            read = await self._store.read({name: cursor}, max_entries=_ENTRIES_PER_READ, wait_s=0.0)
            entries = read.get(name, ())
            for entry in entries:
                cursor = entry.entry_id
                batch = _decode(entry)
                if batch is None or batch.origin.gateway_id == self._gateway_id:  # ours, and forgotten here
                    continue
                if copy is None or (batch.is_first and batch.origin != copy.origin):
                    copy = _Copy(name, batch.origin, EventLog(batch.first_number), cursor, now, now)
                copy.cursor = cursor
                if batch.origin == copy.origin:  # an older one of this name may still be written
                    _add(copy, batch)
            if not entries:
                break
        if copy is None:
            raise RequestNotFound("there is no such stream, or its window has passed")
        return copy

    async def _read(self) -> None:
        """Take in what is new in the mirrors."""
        copies = {copy.name: copy for copy in self._copies.values() if not copy.log.is_over}
        if not copies:
            await asyncio.sleep(_WAIT_S)
            return
        cursors = {name: copy.cursor for name, copy in copies.items()}
        try:
            read = await self._store.read(cursors, max_entries=_ENTRIES_PER_READ, wait_s=_WAIT_S)
        except StoreUnavailable:
            for copy in copies.values():
                copy.is_store_away = True
            await asyncio.sleep(self._config.retry_interval_s)
            return
        now = self._clock.now()
        for name, copy in copies.items():
            copy.store_at, copy.is_store_away = now, False
            self._take(copy, read.get(name, ()))

    def _take(self, copy: _Copy, entries: Iterable[StreamEntry]) -> None:
        for entry in entries:
            copy.cursor = entry.entry_id
            batch = _decode(entry)
            if batch is None or copy.log.is_over:
                continue
            if batch.origin == copy.origin:
                _add(copy, batch)
            elif batch.is_first:  # another stream begins
                _end(copy, _replaced())
        copy.log.trim(self._config.max_stream_bytes)
        if not self._has_room():
            copy.log.trim(0)
            if not self._has_room():
                _end(copy, EventsGone("this gateway has no room for more of the stream"))

    async def _say_read(self) -> None:
        """Renew the leases."""
        now = self._clock.now()
        due = [
            copy
            for copy in self._copies.values()
            if now - copy.leased_at >= min(_LEASE_INTERVAL_S, copy.origin.window_s / 3)
        ]
        if not due:
            return
        puts = (self._store.put(reader_key(copy.name), b"", ttl_s=copy.origin.window_s) for copy in due)
        with contextlib.suppress(StoreUnavailable):  # the owner gives streams a second window then
            await asyncio.gather(*puts)
            for copy in due:
                copy.leased_at = now

    def _check(self, copy: _Copy) -> None:
        """End a copy that will not go on."""
        if copy.log.is_over:
            return
        now = self._clock.now()
        if now - copy.store_at >= self._config.store_patience_s:
            text = "the shared store, through which this gateway reads the stream, is away; its own gateway may have it"
            _end(copy, StoreUnavailable(text))
        elif self._is_alive(copy.origin.gateway_id) or copy.is_store_away:  # nobody is heard without the store
            copy.alive_at = now
        elif now - copy.alive_at >= self._patience_s:
            gone = f"gateway {copy.origin.gateway_id}, which served the request, is gone"
            _end(copy, GatewayGone(f"{gone}; events up to {copy.log.next_index - 1} had been saved"))


def _decode(entry: StreamEntry) -> Batch | None:
    try:
        return batch_from_bytes(entry.value)
    except ProtocolError as error:
        _log.warning("entry %s of a mirror is ignored: %s", entry.entry_id, error)
        return None


def _add(copy: _Copy, batch: Batch) -> None:
    """Take in a batch: events are known by their numbers, so one that is written again adds nothing."""
    log = copy.log
    if log.is_over:
        return
    if batch.first_number > log.next_index:
        _end(copy, EventsGone(f"events from {log.next_index} on are not in the shared store"))
        return
    if news := batch.events[log.next_index - batch.first_number :]:
        log.append(news)
    if batch.is_over:
        log.end(batch.error)
    elif batch.is_cut:
        _end(
            copy,
            EventsGone(f"the stream is too large for the shared store: gateway {copy.origin.gateway_id} has the rest"),
        )


def _replaced() -> RequestNotFound:
    return RequestNotFound("another request has this id by now")


def _end(copy: _Copy, error: ServingError) -> None:
    if not copy.log.is_over:
        copy.log.end(error)
