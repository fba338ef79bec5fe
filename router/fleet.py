"""What a gateway knows about its workers, in one place: records, links, loads, credit, estimates, prefix caches.

Turns all of it into the frozen snapshot that the policy sees. Knows no request's life (the listener, the dispatcher,
does), no store and no socket: records come from a `RecordSource`, what workers say through `DoorListener`, and orders
leave through `WorkerDoors`. A simulator plugs in others.
"""

from collections.abc import Mapping
from typing import Protocol

from core.errors import ServingError
from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerRecord
from router.broadcast import Broadcast
from router.config import RoutingConfig
from router.credit import CreditLedger
from router.estimates import Estimates
from router.forwarding.doors import WorkerDoors
from router.index.prefix_index import PrefixIndex
from router.index.slots import WorkerSlots
from router.messages import WorkEvents
from router.prompt_hashes import HashKey, PromptHashes
from router.snapshot import ClusterSnapshot, WorkerView


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

    def on_worker_down(self, worker_id: WorkerId, error: ServingError) -> None:
        """The stream ended: nothing that was sent over it lives on there."""
        ...

    def on_fleet_changed(self) -> None:
        """Workers came, went, or changed state."""
        ...


class Fleet:
    """The workers of one cluster as one gateway sees them. Implements `router.forwarding.doors.DoorListener`.

    Concurrency: the event loop's thread.
    """

    def __init__(self, config: RoutingConfig, doors: WorkerDoors) -> None:
        self._config = config
        self._listener: FleetListener | None = None
        self._source: RecordSource | None = None
        self._loads: dict[WorkerId, tuple[Epoch, LoadReport]] = {}
        self._epochs: dict[WorkerId, Epoch] = {}
        self.doors = doors
        self.changed = Broadcast()  # workers came, went, or changed state
        self.credit = CreditLedger()
        self.estimates = Estimates(config)
        self.slots = WorkerSlots()
        self.index = PrefixIndex(config.prefix_index_bytes, self.slots)

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

    def views(self) -> tuple[WorkerView, ...]:
        """Return all known workers as the policy sees them."""
        return tuple(self._view(record) for record in self.records.values())

    def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(
            self.views(), self.staleness_s, self.estimates.link_s_per_byte, 1.0 / self._config.default_link_bytes_per_s
        )

    def count_live(self) -> dict[Role, int]:
        """Return how many workers of each role can be asked now."""
        counts = dict.fromkeys(Role, 0)
        for view in self.views():
            counts[view.role] += view.is_live
        return counts

    def hash_key(self, worker_id: WorkerId) -> HashKey:
        record = self.records.get(worker_id)
        return HashKey(record.weights_version, record.block_size) if record is not None else HashKey("", 0)

    def hash_keys(self) -> set[HashKey]:
        """Return every way to hash that some worker uses."""
        return {HashKey(record.weights_version, record.block_size) for record in self.records.values()}

    def held_tokens(self, hashes: PromptHashes) -> dict[WorkerId, int]:
        """Return the prompt tokens that each worker's prefix cache holds; workers with none are absent."""
        held: dict[WorkerId, int] = {}
        for key in self.hash_keys():
            for worker_id, blocks in self.index.match(hashes.of(key)).holders().items():
                if self.hash_key(worker_id) == key:
                    held[worker_id] = blocks * key.block_size
        return held

    def _view(self, record: WorkerRecord) -> WorkerView:
        worker_id = record.worker_id
        load = record.load
        epoch, streamed = self._loads.get(worker_id, (None, load))
        if epoch == record.epoch and streamed.sequence >= load.sequence:
            load = streamed
        return WorkerView(
            worker_id=worker_id,
            role=record.role,
            epoch=record.epoch,
            state=record.state,
            connected_epoch=self.doors.connected_epoch(worker_id),
            layout_fingerprint=record.layout_fingerprint,
            block_size=record.block_size,
            max_model_len=record.max_model_len,
            kv_bytes_per_token=record.kv_bytes_per_token,
            prefill_tokens_per_s=load.prefill_tokens_per_s or self._config.default_prefill_tokens_per_s,
            decode_scale=self.estimates.decode_scale(worker_id),
            load=load,
            credit=self.credit.of(worker_id),
        )

    # --- what it is told ---

    def records_changed(self) -> None:
        """More than the loads in the records is other than before."""
        for worker_id, epoch in list(self._epochs.items()):
            record = self.records.get(worker_id)
            if record is None or record.epoch != epoch:
                self.estimates.forget(worker_id)
                del self._epochs[worker_id]
        self._epochs.update({worker_id: record.epoch for worker_id, record in self.records.items()})
        self._notify()

    def on_up(self, worker_id: WorkerId) -> None:
        self._notify()

    def on_down(self, worker_id: WorkerId, error: ServingError) -> None:
        self._loads.pop(worker_id, None)
        if self._listener is not None:
            self._listener.on_worker_down(worker_id, error)
        self._notify()

    def on_work_events(self, worker_id: WorkerId, events: WorkEvents) -> None:
        if self._listener is not None:
            self._listener.on_work_events(worker_id, events)

    def on_load(self, worker_id: WorkerId, load: LoadReport) -> None:
        epoch = self.doors.connected_epoch(worker_id)
        if epoch is None:
            return
        self._loads[worker_id] = (epoch, load)
        self.credit.reported(worker_id)
        record = self.records.get(worker_id)
        if record is not None and record.role is Role.DECODE:
            self.estimates.observe_load(worker_id, load)

    def _notify(self) -> None:
        self.changed.notify()
        if self._listener is not None:
            self._listener.on_fleet_changed()
