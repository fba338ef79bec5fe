"""The worker records that a gateway goes by: what the store said last, less what it stopped saying long enough ago.

A record that is missing from one scan is not a worker that left: a store that was restarted is empty until everybody
has registered again, and the gateway's own stream to a worker tells of its death sooner. A record of an older epoch
than one seen is what a dead incarnation left behind, and is not believed while the newer one is known."""

from collections.abc import Iterable, Mapping

from core.ids import WorkerId
from core.membership import WorkerRecord


class RecordBook:
    """Records by worker."""

    def __init__(self, forget_after_s: float) -> None:
        self._forget_after_s = forget_after_s
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._missing_since: dict[WorkerId, float] = {}

    @property
    def records(self) -> Mapping[WorkerId, WorkerRecord]:
        return self._records

    def absorb(self, seen: Iterable[WorkerRecord], now: float) -> bool:
        """Take the result of one scan. Returns whether anything but loads changed."""
        changed = False
        present = set()
        for record in seen:
            known = self._records.get(record.worker_id)
            if known is not None and record.epoch < known.epoch:
                continue
            present.add(record.worker_id)
            changed |= known is None or known.model_copy(update={"load": record.load}) != record
            self._records[record.worker_id] = record
        for worker_id in list(self._records):
            if worker_id in present:
                self._missing_since.pop(worker_id, None)
            elif now - self._missing_since.setdefault(worker_id, now) >= self._forget_after_s:
                del self._records[worker_id], self._missing_since[worker_id]
                changed = True
        return changed
