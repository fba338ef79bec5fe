"""A worker's side of the shared store: its record under a lease, and the stream of its KV events.

One task writes everything, so that what readers see is in order:
1. `start` writes the record; it is renewed every third of the lease, and at once when anything but the load changes.
2. `publish` numbers a batch of KV events and queues it; the task appends the queue to the worker's stream.
3. The store may go away: the worker serves on, the task tries again every third of the lease, registers anew when the
   store is back and appends what was queued. When the queue overflows it is dropped whole, and an empty batch with the
   next number takes its place, so that every reader sees the gap and asks the worker for a snapshot.
4. A newer epoch of the same worker in the store fences this incarnation: `on_fenced` is called once and nothing is
   written any more. The record is only ever replaced by compare-and-set, so a fenced worker cannot overwrite its heir.
5. `stop` leaves a STOPPED record to its lease.
6. Whatever else goes wrong ends the task and is told by `on_failed`: a worker whose lease lapsed unnoticed would serve
   on while its heir takes over.

An append whose outcome is unknown is repeated, so a reader may see a batch twice; the number tells.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence

from pydantic import Field, ValidationError

from core.clock import Clock
from core.config import ConfigModel
from core.errors import ConfigError, ServingError, StoreUnavailable, WorkerLost
from core.ids import Epoch
from core.kv_events import KvEvent, KvEventBatch
from core.membership import WorkerRecord, WorkerState, epoch_key, kv_event_stream, worker_key
from core.store import Store

_log = logging.getLogger(__name__)
_MAX_RACES = 8  # another writer of the same record is a dying or a new incarnation: seconds apart, not microseconds


class RegistrationConfig(ConfigModel):
    """How a worker is seen in the shared store."""

    lease_s: float = Field(3.0, gt=0, description="the record vanishes when it was not renewed for so long")
    event_buffer_bytes: int = Field(8 * 2**20, ge=1024, description="KV events kept while the store is away")
    event_stream_entries: int = Field(4096, ge=1, description="KV event batches kept in the store, per worker")


class Registration:
    """Keeps one worker's record alive and publishes its KV events.

    Args:
        record: the first record; its epoch is this incarnation's.
        encode: one event batch to bytes (the layer above knows the wire).
        on_fenced: called once on the event loop, with the newer epoch.
        on_failed: called once on the event loop: nothing more is written, so the worker must not serve on.

    Concurrency: the event loop's thread only.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        record: WorkerRecord,
        config: RegistrationConfig,
        clock: Clock,
        *,
        encode: Callable[[KvEventBatch], bytes],
        on_fenced: Callable[[Epoch], None],
        on_failed: Callable[[ServingError], None],
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._record = record
        self._config = config
        self._clock = clock
        self._encode = encode
        self._on_fenced = on_fenced
        self._on_failed = on_failed
        self._written: bytes | None = None  # what the store holds of us, as far as we know
        self._batches: deque[bytes] = deque()
        self._batch_bytes = 0
        self._sequence = 0
        self._overflows = 0
        self._is_stale = True
        self._is_stopping = False
        self._is_fenced = False
        self._is_store_lost = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def record(self) -> WorkerRecord:
        return self._record

    @property
    def sequence(self) -> int:
        """Number of the last event batch; 0 before the first."""
        return self._sequence

    @property
    def overflows(self) -> int:
        """How often queued events were dropped."""
        return self._overflows

    @property
    def is_store_lost(self) -> bool:
        """The last attempt to reach the store failed."""
        return self._is_store_lost

    def start(self) -> None:
        """Begin to write. Never waits for the store."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="registration")
        self._task.add_done_callback(self._note_end)

    def update(self, **changes: object) -> None:
        """Change fields of the record. A change of the load alone waits for the next renewal."""
        before = self._record
        self._record = before.with_(**changes)
        if before.with_(load=self._record.load) != self._record:
            self._is_stale = True
            self._wake.set()

    def publish(self, events: Sequence[KvEvent]) -> int:
        """Number and queue `events` (none: nothing happens). Returns the last number given."""
        if events:
            self._enqueue(tuple(events))
            if self._batch_bytes > self._config.event_buffer_bytes:
                self._batches.clear()
                self._batch_bytes = 0
                self._overflows += 1
                self._enqueue(())
                _log.warning("KV events overflowed their buffer; readers will resynchronise")
            self._wake.set()
        return self._sequence

    async def stop(self, deadline_s: float) -> None:
        """Write the record as STOPPED, unless fenced, and end the task within `deadline_s`. Idempotent."""
        if self._task is None:
            return
        self._record = self._record.with_(state=WorkerState.STOPPED)
        self._is_stopping = True
        self._wake.set()
        task, self._task = self._task, None
        await asyncio.wait([task], timeout=deadline_s)
        task.cancel()
        await asyncio.wait([task])  # what it raised was told by `_note_end`

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, ServingError):
            _log.error("a defect in the registration", exc_info=error)
            error = WorkerLost(f"the registration of {self._record.worker_id} broke: {error!r}")
        self._on_failed(error)

    def _enqueue(self, events: tuple[KvEvent, ...]) -> None:
        self._sequence += 1
        encoded = self._encode(KvEventBatch(self._record.worker_id, self._record.epoch, self._sequence, events))
        self._batches.append(encoded)
        self._batch_bytes += len(encoded)

    async def _run(self) -> None:
        period_s = self._config.lease_s / 3
        renew_at = self._clock.now()
        while not self._is_fenced:
            self._wake.clear()
            is_last = self._is_stopping
            try:
                if self._is_stale or is_last or self._clock.now() >= renew_at:
                    self._is_stale = False
                    await self._write_record()
                    renew_at = self._clock.now() + period_s
                if not self._is_fenced:
                    await self._append_batches(renew_at)
                self._note_store(lost=False)
            except StoreUnavailable as error:
                self._is_stale = True
                renew_at = self._clock.now() + period_s
                self._note_store(lost=True, why=str(error))
            if is_last:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, renew_at - self._clock.now())):
                    await (self._stop_asked() if self._is_store_lost else self._wake.wait())

    async def _stop_asked(self) -> None:
        """While the store is away only the end wakes us: not every event may cost a failing call."""
        while not self._is_stopping:
            self._wake.clear()
            await self._wake.wait()

    async def _write_record(self) -> None:
        key = worker_key(self._cluster, self._record.worker_id)
        newest = await self._newest_epoch()
        if newest is not None and newest > self._record.epoch:
            self._fence(newest)
            return
        for _ in range(_MAX_RACES):
            value = self._record.model_dump_json().encode()
            if await self._store.compare_and_set(key, self._written, value, ttl_s=self._config.lease_s):
                self._written = value
                return
            self._written = await self._store.get(key)
            holder = _epoch_of(self._written)
            if holder is not None and holder > self._record.epoch:
                self._fence(holder)
                return
        raise StoreUnavailable(f"the record of {self._record.worker_id} keeps changing hands")

    async def _newest_epoch(self) -> Epoch | None:
        key = epoch_key(self._cluster, self._record.worker_id)
        value = await self._store.get(key)
        try:
            return None if value is None else Epoch(int(value))
        except ValueError as error:
            raise ConfigError(f"the store's {key} holds {value!r}, no epoch: something else writes there") from error

    async def _append_batches(self, until: float) -> None:
        stream = kv_event_stream(self._cluster, self._record.worker_id)
        while self._batches and self._clock.now() < until:
            batch = self._batches[0]
            await self._store.append(stream, batch, max_entries=self._config.event_stream_entries)
            if self._batches and self._batches[0] is batch:  # else it overflowed meanwhile
                self._batches.popleft()
                self._batch_bytes -= len(batch)

    def _fence(self, newer: Epoch) -> None:
        self._is_fenced = True
        _log.error("fenced: epoch %d of %s, newer than our %d", newer, self._record.worker_id, self._record.epoch)
        self._on_fenced(newer)

    def _note_store(self, *, lost: bool, why: str = "") -> None:
        if lost and not self._is_store_lost:
            _log.warning("the store is lost, serving on without it: %s", why)
        elif not lost and self._is_store_lost:
            _log.info("the store is back; registered again")
        self._is_store_lost = lost


def _epoch_of(value: bytes | None) -> Epoch | None:
    """Return the epoch of a stored record; None when there is none, or none that can be read."""
    if value is None:
        return None
    try:
        return WorkerRecord.model_validate_json(value).epoch
    except ValidationError:
        return None
