"""Experience and the store: read at the start, saved on a pace while it changes, and once more at the end.

One key per cluster and pool of prefill workers. All of them write it, the last one wins, and a newcomer begins with
what one of its like knew: beliefs are about kinds of links and about codecs on such machines, not about one worker. An
outage of the store costs a line in the log, never a transfer.
"""

import asyncio
import logging

from core.errors import StoreUnavailable
from core.store import Store
from kv_transfer.controller.chooser import Chooser

_log = logging.getLogger(__name__)
_KEPT_S = 30 * 24 * 3600.0  # in the store, when nobody writes it any more


class MemoryKeeper:
    """Event loop only."""

    def __init__(self, chooser: Chooser, store: Store, key: str, *, interval_s: float) -> None:
        self._chooser = chooser
        self._store = store
        self._key = key
        self._interval_s = interval_s
        self._saved_version = 0  # of a chooser that has learned nothing

    async def load(self) -> bool:
        """Give the chooser what was saved. Returns False when there was nothing, or nothing that it can use."""
        try:
            data = await self._store.get(self._key)
        except StoreUnavailable as error:
            _log.warning("the controller starts without experience: %s", error)
            return False
        if data is None or not self._chooser.restore(data):
            return False
        self._saved_version = self._chooser.experience_version
        return True

    async def save(self) -> bool:
        """Save what is new. Returns False when the store is out; the next time will do."""
        version = self._chooser.experience_version
        if version == self._saved_version:
            return True
        data = self._chooser.snapshot()
        try:
            await self._store.put(self._key, data, ttl_s=_KEPT_S)
        except StoreUnavailable as error:
            _log.warning("the controller's experience was not saved: %s", error)
            return False
        self._saved_version = version
        return True

    async def run(self) -> None:
        """Save every `interval_s`, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.save()
