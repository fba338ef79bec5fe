"""A prefill worker: a worker with a desk that computes prompts and hands their KV over."""

from core.clock import Clock
from core.membership import Role, WorkerIdentity
from core.store import Store
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.desk import PrefillDesk
from prefill_workers.metrics import PrefillMetrics
from prefill_workers.rpc import add_prefill_worker
from workers.service import LoadEngine, Opening, Worker


def prefill_worker(
    config: PrefillWorkerConfig,
    identity: WorkerIdentity,
    store: Store,
    clock: Clock | None = None,
    *,
    load_engine: LoadEngine | None = None,
) -> Worker:
    """Return one that has not started. For the arguments see `Worker`."""
    metrics = PrefillMetrics()

    def open_desk(opening: Opening) -> PrefillDesk:
        desk = PrefillDesk(config, opening, metrics)
        add_prefill_worker(desk, opening.calls, opening.server)
        return desk

    return Worker(Role.PREFILL, config, identity, store, clock, metrics.worker, open_desk, load_engine)
