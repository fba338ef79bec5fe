"""Hands out epochs: the only place where an incarnation gets its number.

The counter lives in the store, so that it survives the launcher; the launcher remembers the highest number it gave, so
that a store that is down, or came back empty, never makes a number repeat.
"""

from core.errors import StoreUnavailable
from core.ids import Epoch, WorkerId
from core.membership import epoch_key
from core.store import Store


class EpochLedger:
    """One per launcher. Concurrency: one event loop; calls for one service never overlap (its life is sequential)."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store = store
        self._cluster = cluster
        self._given: dict[WorkerId, int] = {}

    async def draw(self, service: WorkerId) -> Epoch:
        """Return an epoch above every one ever given to `service`."""
        floor = self._given.get(service, 0)
        key = epoch_key(self._cluster, service)
        epoch = floor + 1
        try:
            counted = await self._store.increment(key)
            if counted > floor:
                epoch = counted
            else:  # the store lost its memory
                await self._store.put(key, str(epoch).encode())
        except StoreUnavailable:
            pass  # our own memory decides; the counter catches up at the next draw
        self._given[service] = epoch
        return Epoch(epoch)
