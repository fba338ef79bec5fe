"""What a gateway knows about its workers, in one place: records, links, loads, credit, models, prefix caches.

Keeps the table that the policy reads in step with what it is told. Knows no request's life (the listener, the
dispatcher, does), no store, no socket: records come from a `RecordSource`, what workers say through `WorkerListener`,
and orders leave through `WorkerPort`. A simulator plugs in others.
"""

from collections.abc import Mapping
from typing import Protocol

from core.clock import Clock
from core.errors import ServingError
from core.ids import WorkerId
from core.membership import LoadReport, Role, WorkerRecord
from router.broadcast import Broadcast
from router.forwarding.worker_port import WorkerPort
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots
from router.messages import WorkEvents
from router.prompt_hashes import HashKey, PromptHashes
from router.routing.columns import RoleCode
from router.routing.config import RoutingConfig
from router.routing.credit import CreditLedger
from router.routing.models import Models
from router.routing.table import WorkerTable

_NO_KEY = HashKey("", 0)


class RecordSource(Protocol):
    """Where the worker records come from. Changes are told by `Fleet.records_changed`."""

    @property
    def records(self) -> Mapping[WorkerId, WorkerRecord]: ...

    @property
    def staleness_s(self) -> float:
        """Age of the records."""
        ...


class FleetListener(Protocol):
    """Who is told what the workers do. Called on the event loop, must not block."""

    def on_work_events(self, worker_id: WorkerId, events: WorkEvents) -> None: ...

    def on_room(self, worker_id: WorkerId) -> None:
        """A decode worker told that it holds less than before; the table has it."""
        ...

    def on_worker_down(self, worker_id: WorkerId, error: ServingError) -> None:
        """The stream ended: nothing that was sent over it lives on there."""
        ...

    def on_fleet_changed(self) -> None:
        """Workers came, went, or changed state."""
        ...


class Fleet:
    """The workers of one cluster as one gateway sees them. Implements `router.forwarding.worker_port.WorkerListener`.

    Concurrency: the event loop's thread.
    """

    def __init__(self, config: RoutingConfig, workers: WorkerPort, clock: Clock) -> None:
        self._clock = clock
        self._listener: FleetListener | None = None
        self._source: RecordSource | None = None
        self._hash_keys: dict[WorkerId, HashKey] = {}
        self.workers = workers
        self.changed = Broadcast()  # workers came, went, or changed state
        self.slots = WorkerSlots()
        self.index = PrefixIndex(config.prefix_index_bytes, self.slots)
        self.table = WorkerTable(config, self.slots)
        self.credit = CreditLedger(config, self.table)
        self.models = Models(config, self.table, clock)

    def follow(self, source: RecordSource) -> None:
        """Go by these records from now on."""
        self._source = source

    def listen(self, listener: FleetListener | None) -> None:
        """Tell `listener` from now on; None: nobody."""
        self._listener = listener

    @property
    def records(self) -> Mapping[WorkerId, WorkerRecord]:
        return self._source.records if self._source is not None else {}

    @property
    def staleness_s(self) -> float:
        return self._source.staleness_s if self._source is not None else 0.0

    def count_live(self) -> dict[Role, int]:
        """Return how many workers of each role can be asked now."""
        return self.table.count_live()

    def hash_key(self, worker_id: WorkerId) -> HashKey:
        return self._hash_keys.get(worker_id, _NO_KEY)

    def hash_keys(self) -> set[HashKey]:
        """Return every way to hash that some worker uses."""
        return set(self._hash_keys.values())

    # --- what it is told ---

    def note_prompt(self, hashes: PromptHashes) -> None:
        """A prompt arrived: what is hot follows from all of them."""
        now = self._clock.now()
        for key in self.hash_keys():
            self.index.observe(hashes.of(key), now)

    def records_changed(self) -> None:
        """More than the loads in the records is other than before."""
        now = self._clock.now()
        records = self.records
        for worker_id in self._hash_keys.keys() - records.keys():
            self.table.drop(worker_id)
        for record in records.values():
            self.table.put(record, now)
        self._hash_keys = {
            worker_id: HashKey(record.weights_version, record.block_size) for worker_id, record in records.items()
        }
        self._notify()

    def on_up(self, worker_id: WorkerId) -> None:
        epoch = self.workers.connected_epoch(worker_id)
        assert epoch is not None, "a connection that is up leads somewhere"
        self.table.connected(worker_id, epoch)
        self._notify()

    def on_down(self, worker_id: WorkerId, error: ServingError) -> None:
        self.table.disconnected(worker_id)
        if self._listener is not None:
            self._listener.on_worker_down(worker_id, error)
        self._notify()

    def on_work_events(self, worker_id: WorkerId, events: WorkEvents) -> None:
        if self._listener is not None:
            self._listener.on_work_events(worker_id, events)

    def on_load(self, worker_id: WorkerId, load: LoadReport) -> None:
        before = self._holding(worker_id)
        self.apply_load(worker_id, load)
        after = self._holding(worker_id)
        if self._listener is not None and before is not None and after is not None:
            (num_requests, free_blocks), (num_before, free_before) = after, before
            if num_requests < num_before or free_blocks > free_before:
                self._listener.on_room(worker_id)

    def apply_load(self, worker_id: WorkerId, load: LoadReport) -> None:
        """Take a load that came over the worker's stream, on its own or within an answer."""
        if self.workers.connected_epoch(worker_id) is None:
            return
        self.table.report(worker_id, load, self._clock.now())
        self.credit.reported(worker_id)
        self.models.observe_load(worker_id, load)

    def _holding(self, worker_id: WorkerId) -> tuple[int, int] | None:
        """Return how many requests a decode worker holds, and how many blocks are free there; None for others."""
        slot = self.table.find(worker_id)
        if slot is None:
            return None
        row = self.table.rows[slot]
        return (int(row["requests"]), int(row["free_blocks"])) if row["role"] == RoleCode.DECODE else None

    def _notify(self) -> None:
        self.changed.notify()
        if self._listener is not None:
            self._listener.on_fleet_changed()
