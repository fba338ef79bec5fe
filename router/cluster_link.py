"""The gateway's ends of the real cluster: the shared store's mirror and the gRPC streams, both feeding one fleet."""

import asyncio
import logging
import random

from core.clock import Clock
from core.errors import InvalidRequest, ServingError, WorkerLost
from core.ids import GatewayId, WorkerId
from core.membership import Role
from core.store import Store
from protos import worker_pb2
from router.config import RouterConfig
from router.fleet import Fleet, FleetListener
from router.mirror import StoreMirror
from router.workers import WorkerPool

_log = logging.getLogger(__name__)


class ClusterLink:
    """Owns the fleet's sources.

    Concurrency: the event loop's thread. `run` is one task.
    """

    def __init__(
        self, config: RouterConfig, cluster: str, gateway_id: GatewayId, store: Store, clock: Clock, rng: random.Random
    ) -> None:
        self._pool = WorkerPool(gateway_id, config.workers, clock, rng, config.worker_tls)
        self.fleet = Fleet(config.routing, self._pool, clock)
        self._pool.listen(self.fleet)
        self._mirror = StoreMirror(
            store,
            cluster,
            clock,
            config.mirror,
            self.fleet.index,
            fetch_snapshot=self._pool.fetch_snapshot,
            on_change=self._on_records,
        )
        self.fleet.follow(self._mirror)

    async def run(self, listener: FleetListener) -> None:
        """Mirror the store and keep the links, until cancelled."""
        self.fleet.listen(listener)
        try:
            await self._mirror.run()
        finally:
            await self._pool.close()
            self.fleet.listen(None)

    async def list_kv_decisions(self, worker_id: WorkerId, last: int) -> worker_pb2.ListKvDecisionsResponse:
        """Return the last decisions on compression profiles of one prefill worker.

        Raises:
            InvalidRequest: there is no such worker, or it is no prefill worker.
            ServingError: it is not connected, or does not answer.
        """
        record = self.fleet.records.get(worker_id)
        if record is None or record.role is not Role.PREFILL:
            raise InvalidRequest("worker_id", f"{worker_id!r} is no prefill worker of this cluster")
        channel = self._pool.prefill(worker_id)
        if channel is None:
            raise WorkerLost(f"{worker_id} is not connected")
        return await channel.list_kv_decisions(last)

    async def list_all_kv_decisions(self, last: int) -> list[worker_pb2.ListKvDecisionsResponse]:
        """Return those of every prefill worker that answers."""
        records = self.fleet.records.values()
        names = sorted(record.worker_id for record in records if record.role is Role.PREFILL)
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

    def _on_records(self) -> None:
        self._pool.reconcile(self._mirror.records)
        self.fleet.records_changed()
