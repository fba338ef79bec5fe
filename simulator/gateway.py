"""One real gateway without its sockets: the dispatcher and the fleet of `router`, led to simulated workers."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from core.errors import Aborted
from core.ids import Epoch, GatewayId, TransferId, WorkerId
from core.kv_events import KvEventBatch
from core.membership import LoadReport, WorkerRecord
from core.store import Store
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from router.index.kv_feed import KvFeed
from router.metrics import GatewayMetrics
from router.replicas.config import SharingConfig
from router.replicas.gateway_state import GatewayState
from router.replicas.service import Replicas
from simulator.virtual_time import VirtualLoop
from simulator.wire import Wire
from simulator.worker import Say, SimulatedWorker

_CLUSTER = "simulated"


@dataclass(slots=True)
class SimulatedRecords:
    """Records that never change. Implements `router.fleet.RecordSource`."""

    records: Mapping[WorkerId, WorkerRecord]
    staleness_s: float = field(default=0.0)


class SimulatedWires:
    """Wires to every worker and back. Implements `router.forwarding.worker_port.WorkerPort`."""

    def __init__(self, loop: VirtualLoop, workers: Mapping[WorkerId, SimulatedWorker], delay_s: float) -> None:
        self._workers = workers
        self._to = {worker_id: Wire(loop, delay_s, _call) for worker_id in workers}
        self._back: dict[WorkerId, Wire[Say]] = {}
        self._delay_s = delay_s
        self._loop = loop
        self.num_orders = 0

    def open(self, fleet: Fleet) -> None:
        """Connect every worker; what they say goes to `fleet`."""
        for worker_id, worker in self._workers.items():
            self._back[worker_id] = Wire(self._loop, self._delay_s, partial(_tell, fleet, worker_id))
            worker.connect(self._back[worker_id], self._workers)
            fleet.on_up(worker_id)

    def submit_prefill(self, worker_id: WorkerId, order: PrefillOrder) -> bool:
        self.num_orders += 1
        self._to[worker_id].send(partial(self._workers[worker_id].submit_prefill, order, self._back[worker_id]))
        return True

    def submit_decode(self, worker_id: WorkerId, order: DecodeOrder) -> bool:
        self.num_orders += 1
        self._to[worker_id].send(partial(self._workers[worker_id].submit_decode, order, self._back[worker_id]))
        return True

    def bind(self, worker_id: WorkerId, work_id: TransferId, decode: WorkerRecord | None) -> bool:
        receiver = decode.worker_id if decode is not None else None
        self._to[worker_id].send(partial(self._workers[worker_id].bind, work_id, receiver))
        return True

    def abort(self, worker_id: WorkerId, work_id: TransferId, reason: str) -> None:
        self._to[worker_id].send(partial(self._workers[worker_id].abort, work_id))

    def connected_epoch(self, worker_id: WorkerId) -> Epoch | None:
        return self._workers[worker_id].record.epoch if worker_id in self._back else None


def _call(order: "partial[None]") -> None:
    order()


def _tell(fleet: Fleet, worker_id: WorkerId, what: Say) -> None:
    if isinstance(what, LoadReport):
        fleet.on_load(worker_id, what)
    else:
        fleet.on_work_events(worker_id, what)


class SimulatedGateway:
    """One gateway process.

    Args:
        store: through which it and others share what they know; None: it is alone, or keeps what it knows for itself.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        config: RouterConfig,
        workers: Mapping[WorkerId, SimulatedWorker],
        rng: random.Random,
        *,
        wire_delay_s: float,
        kv_event_delay_s: float,
        name: GatewayId,
        store: Store | None,
    ) -> None:
        self.wires = SimulatedWires(loop, workers, wire_delay_s)
        self.fleet = Fleet(config.routing, self.wires, loop)
        self.fleet.follow(SimulatedRecords({worker_id: worker.record for worker_id, worker in workers.items()}))
        self.dispatcher = Dispatcher(config, self.fleet, loop, rng, GatewayMetrics())
        self.fleet.listen(self.dispatcher)
        self._feeds = {
            worker_id: KvFeed(worker_id, worker.record.epoch, self.fleet.index) for worker_id, worker in workers.items()
        }
        self._cache_wire: Wire[KvEventBatch] = Wire(
            loop, kv_event_delay_s, lambda batch: self._feeds[batch.worker_id].apply(batch)
        )

        self._sharing: asyncio.Task[None] | None = None
        self._replicas: Replicas | None = None
        if store is not None:
            records = self.fleet.records
            state = GatewayState(
                self.fleet.credit,
                self.fleet.table,
                self.dispatcher.affinity,
                self.dispatcher.breakers,
                loop,
                epoch_of=lambda worker_id: records[worker_id].epoch if worker_id in records else None,
            )
            self._replicas = Replicas(store, _CLUSTER, name, loop, SharingConfig(), state, abort_here=lambda *_: False)
            state.tell(self._replicas)

    def open(self) -> None:
        """Connect to the workers, and to the other gateways."""
        self.fleet.records_changed()
        self.wires.open(self.fleet)
        if self._replicas is not None:
            self._sharing = asyncio.create_task(self._replicas.run(), name="replicas")

    def tell_cache(self, batch: KvEventBatch) -> None:
        """A worker's cache changed; the gateway hears of it later."""
        self._cache_wire.send(batch)

    async def close(self) -> None:
        """End what is in flight, and the sharing."""
        self.dispatcher.close(Aborted("the simulation ends"))
        if self._sharing is not None:
            self._sharing.cancel()
            await asyncio.gather(self._sharing, return_exceptions=True)
