"""One real gateway without its sockets: the dispatcher and the fleet of `router`, led to simulated workers."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from core.errors import Aborted
from core.ids import Epoch, TransferId, WorkerId
from core.membership import LoadReport, WorkerRecord
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.forwarding.doors import DecodeOrder, PrefillOrder
from router.metrics import GatewayMetrics
from simulator.virtual_time import VirtualLoop
from simulator.wire import Wire
from simulator.worker import Say, SimulatedWorker


@dataclass(slots=True)
class SimulatedRecords:
    """Records that never change. Implements `router.fleet.RecordSource`."""

    records: Mapping[WorkerId, WorkerRecord]
    staleness_s: float = field(default=0.0)


class SimulatedDoors:
    """Wires to every worker and back. Implements `router.forwarding.doors.WorkerDoors`."""

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
    """One gateway process."""

    def __init__(
        self,
        loop: VirtualLoop,
        config: RouterConfig,
        workers: Mapping[WorkerId, SimulatedWorker],
        rng: random.Random,
        *,
        wire_delay_s: float,
        kv_event_delay_s: float,
    ) -> None:
        self.doors = SimulatedDoors(loop, workers, wire_delay_s)
        self.fleet = Fleet(config.routing, self.doors)
        self.fleet.follow(SimulatedRecords({worker_id: worker.record for worker_id, worker in workers.items()}))
        self.dispatcher = Dispatcher(config, self.fleet, loop, rng, GatewayMetrics())
        self.fleet.listen(self.dispatcher)
        self._cache_wire: Wire[tuple[WorkerId, tuple[bytes, ...], tuple[bytes, ...]]] = Wire(
            loop, kv_event_delay_s, self._hear_of_cache
        )

    def open(self) -> None:
        """Connect to the workers."""
        self.fleet.records_changed()
        self.doors.open(self.fleet)

    def tell_cache(self, worker_id: WorkerId, stored: tuple[bytes, ...], removed: tuple[bytes, ...]) -> None:
        """A worker's cache changed; the gateway hears of it later."""
        self._cache_wire.send((worker_id, stored, removed))

    def close(self) -> None:
        self.dispatcher.close(Aborted("the simulation ends"))

    def _hear_of_cache(self, news: tuple[WorkerId, tuple[bytes, ...], tuple[bytes, ...]]) -> None:
        worker_id, stored, removed = news
        if stored:
            self.fleet.index.store(worker_id, stored)
        if removed:
            self.fleet.index.remove(worker_id, removed)
