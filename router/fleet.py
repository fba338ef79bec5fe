"""Everything a gateway knows about its workers, in one place: the mirror, the links, loads, credit and estimates.

Turns all of it into the frozen snapshot that the policy sees, and sends work over the links. Knows no request's life;
the listener (the dispatcher) does."""

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Protocol

from core.clock import Clock
from core.errors import InvalidRequest, ServingError, WorkerLost
from core.ids import Epoch, GatewayId, TransferId, WorkerId
from core.membership import LoadReport, Role, WorkerRecord
from core.request import GenerateRequest
from core.store import Store
from protos import worker_pb2
from router.broadcast import Broadcast
from router.config import RouterConfig
from router.credit import CreditLedger
from router.estimates import Estimates
from router.mirror import StoreMirror
from router.prefix_index import PrefixIndex
from router.prompt_hashes import HashKey, PromptHashes
from router.snapshot import ClusterSnapshot, WorkerView
from router.worker_codec import WorkEvents
from router.workers import WorkerPool

_log = logging.getLogger(__name__)


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
    """The workers of one cluster as one gateway sees them.

    Concurrency: the event loop's thread. `run` is one task.
    """

    def __init__(
        self, config: RouterConfig, cluster: str, gateway_id: GatewayId, store: Store, clock: Clock, rng: random.Random
    ) -> None:
        self._routing = config.routing
        self._listener: FleetListener | None = None
        self._loads: dict[WorkerId, tuple[Epoch, LoadReport]] = {}
        self._epochs: dict[WorkerId, Epoch] = {}
        self.changed = Broadcast()  # workers came, went, or changed state
        self.credit = CreditLedger()
        self.estimates = Estimates(config.routing)
        self.index = PrefixIndex(config.routing.prefix_index_bytes)
        self.pool = WorkerPool(
            gateway_id,
            config.workers,
            clock,
            rng,
            on_up=self._on_up,
            on_down=self._on_down,
            on_report=self._on_report,
        )
        self._mirror = StoreMirror(
            store,
            cluster,
            clock,
            config.mirror,
            self.index,
            fetch_snapshot=self.pool.fetch_snapshot,
            on_change=self._on_records,
        )

    @property
    def records(self) -> Mapping[WorkerId, WorkerRecord]:
        return self._mirror.records

    @property
    def staleness_s(self) -> float:
        return self._mirror.staleness_s

    async def run(self, listener: FleetListener) -> None:
        """Mirror the store and keep the links, until cancelled."""
        self._listener = listener
        try:
            await self._mirror.run()
        finally:
            await self.pool.close()
            self._listener = None

    def views(self) -> tuple[WorkerView, ...]:
        """Return all known workers as the policy sees them."""
        return tuple(self._view(record) for record in self.records.values())

    def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(
            self.views(), self.staleness_s, self.estimates.link_s_per_byte, 1.0 / self._routing.default_link_bytes_per_s
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
            for worker_id, blocks in self.index.match(hashes.of(key)).items():
                if self.hash_key(worker_id) == key:
                    held[worker_id] = blocks * key.block_size
        return held

    def submit_decode(self, worker_id: WorkerId, request: GenerateRequest, work_id: TransferId) -> bool:
        """Ask to reserve. Returns False when the worker is not connected."""
        channel = self.pool.decode(worker_id)
        if channel is None:
            return False
        channel.submit(request, work_id)
        return True

    def submit_prefill(
        self,
        worker_id: WorkerId,
        request: GenerateRequest,
        work_id: TransferId,
        decode: WorkerId | None,
        *,
        cached_tokens: int,
    ) -> bool:
        """Send the prompt. Returns False when it is not connected, or the decode worker is not known any more.

        Args:
            work_id: names the transfer, too.
            cached_tokens: of the prompt, that the worker should have in its prefix cache.
        """
        channel = self.pool.prefill(worker_id)
        decode_record = self.records.get(decode) if decode is not None else None
        if channel is None or (decode is not None and decode_record is None):
            return False
        channel.submit(request, work_id, decode_record, cached_tokens=cached_tokens)
        return True

    async def list_kv_decisions(self, worker_id: WorkerId, last: int) -> worker_pb2.ListKvDecisionsResponse:
        """Return the last decisions on compression profiles of one prefill worker.

        Raises:
            InvalidRequest: there is no such worker, or it is no prefill worker.
            ServingError: it is not connected, or does not answer.
        """
        record = self.records.get(worker_id)
        if record is None or record.role is not Role.PREFILL:
            raise InvalidRequest("worker_id", f"{worker_id!r} is no prefill worker of this cluster")
        channel = self.pool.prefill(worker_id)
        if channel is None:
            raise WorkerLost(f"{worker_id} is not connected")
        return await channel.list_kv_decisions(last)

    async def list_all_kv_decisions(self, last: int) -> list[worker_pb2.ListKvDecisionsResponse]:
        """Return those of every prefill worker that answers."""
        names = sorted(record.worker_id for record in self.records.values() if record.role is Role.PREFILL)
        answers = await asyncio.gather(*(self.list_kv_decisions(name, last) for name in names), return_exceptions=True)
        found = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, ServingError):
                _log.warning("decisions of %s: %s", name, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append(answer)
        return found

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
            connected_epoch=self.pool.connected_epoch(worker_id),
            layout_fingerprint=record.layout_fingerprint,
            block_size=record.block_size,
            max_model_len=record.max_model_len,
            kv_bytes_per_token=record.kv_bytes_per_token,
            prefill_tokens_per_s=load.prefill_tokens_per_s or self._routing.default_prefill_tokens_per_s,
            decode_scale=self.estimates.decode_scale(worker_id),
            load=load,
            credit=self.credit.of(worker_id),
        )

    def _on_records(self) -> None:
        self.pool.reconcile(self.records)
        for worker_id, epoch in list(self._epochs.items()):
            record = self.records.get(worker_id)
            if record is None or record.epoch != epoch:
                self.estimates.forget(worker_id)
                del self._epochs[worker_id]
        self._epochs.update({worker_id: record.epoch for worker_id, record in self.records.items()})
        self._notify()

    def _on_up(self, worker_id: WorkerId) -> None:
        self._notify()

    def _on_down(self, worker_id: WorkerId, error: ServingError) -> None:
        self._loads.pop(worker_id, None)
        if self._listener is not None:
            self._listener.on_worker_down(worker_id, error)
        self._notify()

    def _on_report(self, worker_id: WorkerId, report: WorkEvents | LoadReport) -> None:
        if not isinstance(report, LoadReport):
            if self._listener is not None:
                self._listener.on_work_events(worker_id, report)
            return
        epoch = self.pool.connected_epoch(worker_id)
        if epoch is None:
            return
        self._loads[worker_id] = (epoch, report)
        self.credit.reported(worker_id)
        record = self.records.get(worker_id)
        if record is not None and record.role is Role.DECODE:
            self.estimates.observe_load(worker_id, report)

    def _notify(self) -> None:
        self.changed.notify()
        if self._listener is not None:
            self._listener.on_fleet_changed()
