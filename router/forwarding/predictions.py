"""What the prefix index was told to expect of works on their way: one that a worker did not take is taken back.

1. `sent`: the blocks of a prompt count as held by the worker from that moment on.
2. `came_true`: the worker has computed or received them; its own events tell the rest.
3. `withdrawn` before that (refused, lost, aborted): the blocks that no other work on its way there needs are taken
   back. Otherwise the request itself, looking where to go now, would be drawn to the worker that has just refused it,
   and its siblings after it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from core.ids import WorkerId
from router.index.prefix_index import PrefixIndex


@dataclass(slots=True)
class _Prediction:
    hashes: Sequence[bytes]
    kept: int  # leading blocks that the worker has, or is to have, whatever becomes of this work


class Predictions:
    """By worker and work; keys of works are unique per attempt. The caller owns the time."""

    def __init__(self, index: PrefixIndex, ttl_s: float) -> None:
        self._index = index
        self._ttl_s = ttl_s
        self._open: dict[WorkerId, dict[str, _Prediction]] = {}

    def __len__(self) -> int:
        """How many works are on their way."""
        return sum(map(len, self._open.values()))

    def sent(self, worker_id: WorkerId, work_id: str, hashes: Sequence[bytes], now: float) -> None:
        """A work with a prompt of these blocks goes to `worker_id`."""
        works = self._open.setdefault(worker_id, {})
        if work_id not in works:
            works[work_id] = _Prediction(hashes, self._index.predict(worker_id, hashes, now, self._ttl_s))

    def came_true(self, worker_id: WorkerId, work_id: str) -> None:
        """The worker holds the blocks. Idempotent."""
        self._close(worker_id, work_id)

    def withdrawn(self, worker_id: WorkerId, work_id: str) -> None:
        """The worker has nothing of the work any more. Idempotent, and nothing to do once it came true."""
        gone = self._close(worker_id, work_id)
        if gone is None:
            return
        kept = gone.kept
        for other in self._open.get(worker_id, {}).values():
            if _common_blocks(other.hashes, gone.hashes, gone.kept) > gone.kept:
                other.kept = min(other.kept, gone.kept)  # what this one added is its own to withdraw now
                kept = max(kept, _common_blocks(other.hashes, gone.hashes, kept))
        if kept < len(gone.hashes):
            self._index.withdraw(worker_id, gone.hashes, kept)

    def _close(self, worker_id: WorkerId, work_id: str) -> _Prediction | None:
        works = self._open.get(worker_id)
        if works is None:
            return None
        found = works.pop(work_id, None)
        if not works:
            del self._open[worker_id]
        return found


def _common_blocks(one: Sequence[bytes], other: Sequence[bytes], at_least: int) -> int:
    """Return how many leading blocks are the same; a chained hash that is equal says so of all before it."""
    shorter = min(len(one), len(other))
    if at_least >= shorter or one[at_least] != other[at_least]:
        return at_least
    return bisect_left(range(shorter), True, at_least, key=lambda block: one[block] != other[block])
