"""Makes an old incarnation invalid for everybody: draws the next epoch and announces it where readers look."""

import logging

from pydantic import ValidationError

from cluster.supervision.epochs import EpochLedger
from core.errors import StoreUnavailable
from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerRecord, WorkerState, worker_key
from core.store import Store

_log = logging.getLogger(__name__)


class StoreFencer:
    """Implements `cluster.supervision.supervisor.Fencer` over the shared store.

    The old incarnation, should it still run, finds a newer epoch at its next renewal and gives up; routers drop it when
    they see the announcement. With the store down only the number is drawn: the new incarnation announces itself later.
    """

    def __init__(self, store: Store, cluster: str, *, announcement_s: float) -> None:
        """Args: announcement_s: how long the record lives unless the new incarnation takes it over."""
        self._store = store
        self._cluster = cluster
        self._ledger = EpochLedger(store, cluster)
        self._announcement_s = announcement_s

    async def fence(self, service: WorkerId, kind: str, cause: str) -> Epoch:
        epoch = await self._ledger.draw(service)
        if kind in set(Role):
            record = WorkerRecord(
                worker_id=service,
                role=Role(kind),
                epoch=epoch,
                state=WorkerState.STARTING,
                detail=f"to be restarted: {cause}" if cause else "",
            )
            try:
                await self._announce(record)
            except StoreUnavailable as error:
                _log.warning("%s: epoch %d not announced: %s", service, epoch, error)
        return epoch

    async def _announce(self, record: WorkerRecord) -> None:
        """Replace the record, unless a newer incarnation holds it."""
        key = worker_key(self._cluster, record.worker_id)
        value = record.model_dump_json().encode()
        held = await self._store.get(key)
        while held is None or _epoch(held) < record.epoch:
            if await self._store.compare_and_set(key, held, value, ttl_s=self._announcement_s):
                return
            held = await self._store.get(key)  # it was renewed, or went, in between


def _epoch(value: bytes) -> int:
    """Return the epoch of a record; 0, so that it is replaced, when it cannot be read."""
    try:
        return WorkerRecord.model_validate_json(value).epoch
    except ValidationError:
        return 0
