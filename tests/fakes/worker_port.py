"""The port to the workers without sockets: a gateway's dispatcher over workers that a test plays, event by event."""

import random
from collections.abc import Callable
from typing import Any

from core.clock import MonotonicClock
from core.errors import WorkerLost
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from core.request import GenerateRequest, SamplingParams
from router import messages as m
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from router.metrics import GatewayMetrics
from router.prompt_hashes import PromptHashes
from router.stream import RequestStream

Order = PrefillOrder | DecodeOrder


class FakeWorkers:
    """Keeps what is sent, by worker and work, until the test answers."""

    def __init__(self) -> None:
        self.epochs: dict[WorkerId, Epoch] = {}
        self.orders: dict[tuple[WorkerId, TransferId], Order] = {}
        self.sent: list[tuple[WorkerId, Order]] = []
        self.binds: list[tuple[WorkerId, TransferId, WorkerId | None]] = []
        self.aborts: list[tuple[WorkerId, TransferId]] = []

    def submit_prefill(self, worker_id: WorkerId, order: PrefillOrder) -> bool:
        return self._take(worker_id, order)

    def submit_decode(self, worker_id: WorkerId, order: DecodeOrder) -> bool:
        return self._take(worker_id, order)

    def bind(self, worker_id: WorkerId, work_id: TransferId, decode: WorkerRecord | None) -> bool:
        self.binds.append((worker_id, work_id, decode.worker_id if decode is not None else None))
        return worker_id in self.epochs

    def abort(self, worker_id: WorkerId, work_id: TransferId, reason: str) -> None:
        self.aborts.append((worker_id, work_id))
        self.orders.pop((worker_id, work_id), None)

    def connected_epoch(self, worker_id: WorkerId) -> Epoch | None:
        return self.epochs.get(worker_id)

    def _take(self, worker_id: WorkerId, order: Order) -> bool:
        if worker_id not in self.epochs:
            return False
        self.orders[worker_id, order.work_id] = order
        self.sent.append((worker_id, order))
        return True


class FakeRecords:
    """Source of records."""

    staleness_s = 0.0

    def __init__(self) -> None:
        self.records: dict[WorkerId, WorkerRecord] = {}


class FakeGateway:
    """A real dispatcher and fleet over a fake port to the workers."""

    def __init__(self, *, num_prefills: int = 2, num_decodes: int = 2, seed: int = 1, **config: Any) -> None:
        settings = {"model_path": ".", "retry_min_s": 0.001, "retry_max_s": 0.01, **config}
        self.config = RouterConfig.model_validate(settings)
        self.clock = MonotonicClock()
        self.workers = FakeWorkers()
        self.source = FakeRecords()
        self.metrics = GatewayMetrics()
        self.fleet = Fleet(self.config.routing, self.workers, self.clock)
        self.fleet.follow(self.source)
        self.dispatcher = Dispatcher(self.config, self.fleet, self.clock, random.Random(seed), self.metrics)
        self.fleet.listen(self.dispatcher)
        self.prefills = [WorkerId(f"p{index}") for index in range(num_prefills)]
        self.decodes = [WorkerId(f"d{index}") for index in range(num_decodes)]
        for worker_id in (*self.prefills, *self.decodes):
            self.join(worker_id)

    def join(self, worker_id: WorkerId, epoch: int = 1) -> None:
        """A worker registers and is connected."""
        self.source.records[worker_id] = WorkerRecord(
            worker_id=worker_id,
            role=Role.PREFILL if worker_id.startswith("p") else Role.DECODE,
            epoch=Epoch(epoch),
            state=WorkerState.READY,
            address="nowhere:1",
            layout_fingerprint="layout",
            weights_version="w",
            kv_bytes_per_token=1000,
            block_size=4,
            max_model_len=512,
        )
        self.workers.epochs[worker_id] = Epoch(epoch)
        self.fleet.records_changed()
        self.fleet.on_up(worker_id)

    def lose(self, worker_id: WorkerId) -> None:
        """The stream to a worker ends."""
        del self.workers.epochs[worker_id]
        self.workers.orders = {key: order for key, order in self.workers.orders.items() if key[0] != worker_id}
        self.fleet.on_down(worker_id, WorkerLost("gone"))

    def submit(
        self, name: str, *, num_tokens: int = 16, max_tokens: int = 4, timeout_s: float = 60.0, **more: Any
    ) -> RequestStream:
        prompt = tuple(range(num_tokens))
        request = GenerateRequest(RequestId(name), prompt, SamplingParams(max_tokens=max_tokens))
        return self.dispatcher.submit(
            request, PromptHashes(prompt), arrived_at=self.clock.now(), timeout_s=timeout_s, **more
        )

    def tell(self, worker_id: WorkerId, work_id: str, *events: m.Event) -> None:
        """A worker tells of a work."""
        self.fleet.on_work_events(worker_id, [(work_id, event) for event in events])

    def report(self, worker_id: WorkerId, sequence: int, **load: int) -> None:
        self.fleet.on_load(worker_id, LoadReport(sequence=sequence, **load))

    def orders_at(self, choose: Callable[[WorkerId], bool] = lambda _: True) -> list[tuple[WorkerId, Order]]:
        """Return what is unanswered or at work, oldest first."""
        return [(worker_id, order) for (worker_id, _), order in self.workers.orders.items() if choose(worker_id)]

    def check_books(self) -> None:
        """Assert what must hold when nothing is in flight."""
        for worker_id in self.source.records:
            assert self.dispatcher.num_on_worker(worker_id) == 0
            assert self.fleet.credit.of(worker_id).num_requests == 0, worker_id
        assert self.dispatcher.num_active == self.dispatcher.num_queued == len(self.dispatcher.predictions) == 0
        self.fleet.table.check()
        self.fleet.index.check()
        self.dispatcher.breakers.check()
        self.dispatcher.placer.explanations.check()
        assert not self.fleet.table.rows["own_reserved"].any()
