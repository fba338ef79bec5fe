"""The gateway's mirror of the shared store: worker records by scanning, prefix index by following KV event streams.

Everything here only reads. When the store is gone the mirror keeps what it has, says how old that is, and tries
again; the gateway's decisions go on. A feed that lost its place stops being read, so that its cursor stays before the
gap, and is set right by a snapshot from the worker itself."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from core.clock import Clock
from core.errors import ProtocolError, ServingError, StoreUnavailable
from core.ids import Epoch, WorkerId
from core.kv_events import BlocksStored
from core.membership import WorkerRecord, WorkerState, kv_event_stream, worker_prefix
from core.store import STREAM_START, Store, StreamEntry
from protos import worker_pb2
from protos.codec import kv_events_from_wire
from router.config import MirrorConfig
from router.index.kv_feed import FeedResult, KvFeed
from router.index.prefix_index import PrefixIndex
from router.record_book import RecordBook

_log = logging.getLogger(__name__)
_SWEEP_ENTRIES = 50_000  # under 10 ms if all of them have to go, under one if few have
_SERVING = (WorkerState.READY, WorkerState.DRAINING)


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """All that one worker's prefix cache held when event number `sequence` had been sent."""

    epoch: Epoch
    sequence: int
    chains: tuple[BlocksStored, ...]


FetchSnapshot = Callable[[WorkerRecord], Awaitable[CacheSnapshot]]
"""Asks a worker; raises ServingError."""


class StoreMirror:
    """Owns the records and keeps `index` fed.

    Args:
        on_change: called on the event loop after a scan in which more than loads changed.

    Concurrency: the event loop's thread; `run` is one task.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        clock: Clock,
        config: MirrorConfig,
        index: PrefixIndex,
        *,
        fetch_snapshot: FetchSnapshot,
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._clock = clock
        self._config = config
        self._index = index
        self._fetch_snapshot = fetch_snapshot
        self._on_change = on_change
        self._book = RecordBook(config.forget_after_s)
        self._scanned_at = clock.now()
        self._is_store_lost = False
        self._unreadable: dict[str, bytes] = {}  # as of the last scan
        self._feeds: dict[WorkerId, KvFeed] = {}
        self._cursors: dict[WorkerId, str] = {}
        self._resyncs: dict[WorkerId, asyncio.Task[None]] = {}
        self._feeds_changed = asyncio.Event()

    @property
    def records(self) -> Mapping[WorkerId, WorkerRecord]:
        return self._book.records

    @property
    def staleness_s(self) -> float:
        """Seconds since the last scan that succeeded (since construction, before the first)."""
        return self._clock.now() - self._scanned_at

    async def run(self) -> None:
        """Mirror until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_records(), name="mirror records")
                group.create_task(self._follow_events(), name="mirror KV events")
        finally:
            for task in self._resyncs.values():
                task.cancel()
            await asyncio.gather(*self._resyncs.values(), return_exceptions=True)

    async def _follow_records(self) -> None:
        while True:
            try:
                found = await self._store.scan(worker_prefix(self._cluster))
            except StoreUnavailable as error:
                self._note_store(lost=True, why=str(error))
            else:
                self._note_store(lost=False)
                self._scanned_at = self._clock.now()
                if self._book.absorb(self._parse(found), self._scanned_at):
                    self._reconcile_feeds()
                    self._on_change()
            await asyncio.sleep(self._config.poll_interval_s)

    def _parse(self, found: Mapping[str, bytes]) -> list[WorkerRecord]:
        records = []
        unreadable: dict[str, bytes] = {}
        for key, value in found.items():
            try:
                records.append(WorkerRecord.model_validate_json(value))
            except ValidationError as error:
                unreadable[key] = value
                if self._unreadable.get(key) == value:
                    continue  # told already; every scan meets it again
                _log.warning("%s holds no worker record and is ignored: %s", key, error.errors()[0]["msg"])
        self._unreadable = unreadable
        return records

    def _reconcile_feeds(self) -> None:
        for worker_id in self._feeds.keys() - self.records.keys():
            self._index.forget(worker_id)
            del self._feeds[worker_id], self._cursors[worker_id]
        for worker_id, record in self.records.items():
            feed = self._feeds.get(worker_id)
            if feed is None:
                feed = self._feeds[worker_id] = KvFeed(worker_id, record.epoch, self._index)
                self._cursors[worker_id] = STREAM_START
                feed.is_lost = record.state in _SERVING  # it may hold a cache that its stream no longer tells of
            elif record.epoch > feed.epoch:
                feed.restart(record.epoch)
        self._feeds_changed.set()
        self._resynchronise_lost()

    async def _follow_events(self) -> None:
        while True:
            self._feeds_changed.clear()
            followed = {
                kv_event_stream(self._cluster, worker_id): worker_id
                for worker_id, feed in self._feeds.items()
                if not feed.is_lost
            }
            if not followed:
                await self._feeds_changed.wait()
                continue
            cursors = {stream: self._cursors[worker_id] for stream, worker_id in followed.items()}
            try:
                read = await self._store.read(
                    cursors, max_entries=self._config.kv_events_per_read, wait_s=self._config.poll_interval_s
                )
            except StoreUnavailable:  # the record loop tells of it
                await asyncio.sleep(self._config.poll_interval_s)
                continue
            for stream, entries in read.items():
                self._apply(followed[stream], entries)
            self._index.sweep(_SWEEP_ENTRIES)
            self._resynchronise_lost()

    def _apply(self, worker_id: WorkerId, entries: Sequence[StreamEntry]) -> None:
        feed = self._feeds.get(worker_id)
        if feed is None:
            return  # left while we read
        for entry in entries:
            try:
                batch = kv_events_from_wire(worker_pb2.KvEventBatch.FromString(entry.value))
                if feed.apply(batch) is FeedResult.GAP:
                    return
            except (DecodeError, ProtocolError) as error:
                _log.warning("KV events of %s cannot be read: %s", worker_id, error)
                feed.is_lost = True  # a snapshot covers what the entry may have said
            self._cursors[worker_id] = entry.entry_id

    def _resynchronise_lost(self) -> None:
        for worker_id, feed in self._feeds.items():
            if feed.is_lost and worker_id not in self._resyncs:
                task = asyncio.create_task(self._resynchronise(worker_id), name=f"resynchronise {worker_id}")
                self._resyncs[worker_id] = task

    async def _resynchronise(self, worker_id: WorkerId) -> None:
        try:
            while (feed := self._feeds.get(worker_id)) is not None and feed.is_lost:
                try:
                    snapshot = await self._fetch_snapshot(self.records[worker_id])
                    if self._feeds.get(worker_id) is not feed:
                        continue
                    if feed.resynchronise(snapshot.epoch, snapshot.sequence, snapshot.chains):
                        self._feeds_changed.set()
                        return
                except ServingError as error:
                    _log.debug("no cache snapshot of %s yet: %s", worker_id, error)
                await asyncio.sleep(self._config.poll_interval_s)
        finally:
            del self._resyncs[worker_id]

    def _note_store(self, *, lost: bool, why: str = "") -> None:
        if lost and not self._is_store_lost:
            _log.warning("the store is lost, routing on what is known: %s", why)
        elif not lost and self._is_store_lost:
            _log.info("the store is back after %.1f s", self.staleness_s)
        self._is_store_lost = lost
