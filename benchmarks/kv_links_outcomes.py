"""What both ends of the links benchmark call a transfer, and their notes of when each one ended."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from core.ids import RequestId, TransferId
from kv_transfer.ports import LandedStats

RUN_LIMIT_S = 150.0
LEASE_S = 300.0

Reply = dict[str, Any]


def names_of(run: int, index: int) -> tuple[TransferId, RequestId]:
    return TransferId(f"links-{run}-{index}/0"), RequestId(f"links-{run}-{index}")


class Outcomes:
    """When each transfer of a run ended, by its index: on either side, on the event loop."""

    def __init__(self) -> None:
        self.ended_at: dict[int, float] = {}
        self.failures: dict[int, str] = {}
        self._changed = asyncio.Event()

    async def wait(self, indices: Iterable[int]) -> None:
        """Return when all of these have ended."""
        awaited = set(indices)
        while not awaited <= self.ended_at.keys():
            self._changed.clear()
            await self._changed.wait()

    def on_acked(self, transfer_id: TransferId) -> None:
        self._end(transfer_id)

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        self._end(transfer_id)

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self._end(transfer_id, f"{reason}: {detail}")

    def refuse(self, transfer_id: TransferId, detail: str) -> None:
        """Count a transfer that could not even begin."""
        self._end(transfer_id, detail)

    def _end(self, transfer_id: TransferId, failure: str = "") -> None:
        index = int(transfer_id.partition("/")[0].rpartition("-")[2])
        self.ended_at[index] = time.monotonic()
        if failure:
            self.failures[index] = failure
        self._changed.set()
