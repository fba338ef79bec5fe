"""In-flight credit: work sent to a worker counts as its load from that moment until a report of the worker includes it.

Without it a burst that arrives between two load reports sees one idle worker and goes there whole. Life of an entry:
added when work is sent; marked when the worker accepts; dropped by the first load report that came over the same stream
after that (the stream is ordered, so that report includes it), or when the work ends.
"""

from dataclasses import dataclass, replace

from core.ids import WorkerId
from router.snapshot import NO_CREDIT, Credit


@dataclass(slots=True)
class _Entry:
    credit: Credit
    is_accepted: bool = False


class CreditLedger:
    """Credit per worker. Keys of works are unique per attempt."""

    def __init__(self) -> None:
        self._entries: dict[WorkerId, dict[str, _Entry]] = {}
        self._totals: dict[WorkerId, Credit] = {}

    def add(self, worker_id: WorkerId, work_id: str, *, prefill_tokens: int, context_tokens: int) -> None:
        """`work_id` is being sent, or will be, to `worker_id`. Replaces what was said of it before."""
        self.drop(worker_id, work_id)
        entry = _Entry(Credit(1, prefill_tokens, context_tokens))
        self._entries.setdefault(worker_id, {})[work_id] = entry
        self._change(worker_id, entry.credit, 1)

    def accepted(self, worker_id: WorkerId, work_id: str) -> None:
        entry = self._entries.get(worker_id, {}).get(work_id)
        if entry is not None:
            entry.is_accepted = True

    def reported(self, worker_id: WorkerId) -> None:
        """A load report came over the worker's stream."""
        entries = self._entries.get(worker_id, {})
        for work_id in [work_id for work_id, entry in entries.items() if entry.is_accepted]:
            self.drop(worker_id, work_id)

    def drop(self, worker_id: WorkerId, work_id: str) -> None:
        """The work ended, or was refused. Idempotent."""
        entries = self._entries.get(worker_id, {})
        entry = entries.pop(work_id, None)
        if entry is None:
            return
        if entries:
            self._change(worker_id, entry.credit, -1)
        else:
            del self._entries[worker_id], self._totals[worker_id]

    def of(self, worker_id: WorkerId) -> Credit:
        return self._totals.get(worker_id, NO_CREDIT)

    def _change(self, worker_id: WorkerId, credit: Credit, sign: int) -> None:
        total = self.of(worker_id)
        self._totals[worker_id] = replace(
            total,
            num_requests=total.num_requests + sign * credit.num_requests,
            prefill_tokens=total.prefill_tokens + sign * credit.prefill_tokens,
            context_tokens=total.context_tokens + sign * credit.context_tokens,
        )
