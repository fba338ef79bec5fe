"""A decode worker: a worker with a desk that takes KV in and goes on from there."""

from core.clock import Clock
from core.membership import Role, WorkerIdentity
from core.store import Store
from decode_workers.config import DecodeWorkerConfig
from decode_workers.desk import DecodeDesk
from decode_workers.metrics import DecodeMetrics
from decode_workers.rpc import add_decode_worker
from workers.service import LoadEngine, Opening, Worker


def decode_worker(
    config: DecodeWorkerConfig,
    identity: WorkerIdentity,
    store: Store,
    clock: Clock | None = None,
    *,
    load_engine: LoadEngine | None = None,
) -> Worker:
    """Return one that has not started. For the arguments see `Worker`."""
    metrics = DecodeMetrics()

    def open_desk(opening: Opening) -> DecodeDesk:
        desk = DecodeDesk(config, opening, metrics)
        add_decode_worker(desk, opening.calls, opening.server)
        return desk

    return Worker(Role.DECODE, config, identity, store, clock, metrics.worker, open_desk, load_engine)
