"""In-flight credit: work sent to a worker counts as its load from that moment until a report of the worker includes it.

Without it a burst that arrives between two load reports sees one idle worker and goes there whole. Life of an entry:

1. placed: all of it counts, and a request that will decode joins the forecast at the predicted end of its prefill;
2. accepted, and then reported (the stream is ordered, so that report includes it): the credit ends; of a reservation
   the time of its joining is still known here, and nowhere else, so it stays in the forecast;
3. landed, and then reported: it is in the batch that the report shows;
4. dropped: refused or ended.

The sums live in the columns of the worker table, where the policy reads them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.ids import WorkerId
from router.routing.config import RoutingConfig, Term
from router.routing.decision import Decision
from router.routing.modes import Mode
from router.routing.table import NO_CREDIT, Credit, WorkerTable

_STEPS_WEIGHT = 0.05  # of the newest request in the mean length of a worker's answers


@dataclass(slots=True)
class _Entry:
    credit: Credit
    tokens: int  # that it adds to the batch
    is_reservation: bool = False  # KV will come from elsewhere
    bucket: int | None = None  # in the forecast
    is_accepted: bool = False
    is_reported: bool = False
    is_landed: bool = False


class CreditLedger:
    """Keys of works are unique per attempt.

    Attributes:
        on_changed: told of every worker whose credit changed.
    """

    def __init__(self, config: RoutingConfig, table: WorkerTable) -> None:
        self._is_ignored = Term.CREDIT in config.ignored_terms
        self._table = table
        self._entries: dict[WorkerId, dict[str, _Entry]] = {}
        self.on_changed: Callable[[WorkerId], None] | None = None
        table.on_reset.append(self._forget)

    def place(self, work_id: str, decision: Decision, now: float, *, expected_output_tokens: int = 0) -> None:
        """Count what `decision` sends to its workers under `work_id`. A side that was placed before stays as it is."""
        winner = decision.winner
        tokens = winner.uncached_tokens + winner.held_tokens
        prompt = Credit(1, winner.uncached_tokens, tokens, winner.compute_s)
        if decision.mode is not Mode.REMOTE_PREFILL:
            alone = winner.prefill or winner.decode
            assert alone is not None, "somebody does it"
            bucket_at = None if winner.decode is None else now + winner.ready_in_s
            self._add(alone, work_id, _Entry(prompt, tokens), bucket_at)
            self._note_steps(alone, expected_output_tokens)
            return
        assert winner.prefill is not None, "a remote prefill has a prefill worker"
        if work_id not in self._entries.get(winner.prefill, {}):
            self._add(winner.prefill, work_id, _Entry(prompt, tokens), None)
        self.place_decode(work_id, decision, now, expected_output_tokens=expected_output_tokens)

    def place_decode(self, work_id: str, decision: Decision, now: float, *, expected_output_tokens: int = 0) -> None:
        """Count the decode side only: the prefill is under way. Nothing to do while it is to be chosen."""
        decode = decision.decode
        if decode is None or work_id in self._entries.get(decode, {}):
            return
        winner = decision.winner
        tokens = winner.uncached_tokens + winner.held_tokens
        joins_at = now + winner.ready_in_s + winner.terms.transfer_s
        self._add(decode, work_id, _Entry(Credit(1, 0, tokens), tokens, is_reservation=True), joins_at)
        self._note_steps(decode, expected_output_tokens)

    def accepted(self, worker_id: WorkerId, work_id: str) -> None:
        entry = self._entries.get(worker_id, {}).get(work_id)
        if entry is not None:
            entry.is_accepted = True

    def landed(self, worker_id: WorkerId, work_id: str) -> None:
        """Its KV is there: the next report shows it in the batch."""
        entry = self._entries.get(worker_id, {}).get(work_id)
        if entry is not None:
            entry.is_landed = True

    def computed(self, worker_id: WorkerId, work_id: str) -> None:
        """The prompt is computed: no report needs to tell."""
        entry = self._entries.get(worker_id, {}).get(work_id)
        if entry is not None and not entry.is_reservation:
            self.drop(worker_id, work_id)

    def reported(self, worker_id: WorkerId) -> None:
        """A load report came over the worker's stream."""
        entries = self._entries.get(worker_id)
        if not entries:
            return
        ended = []
        for work_id, entry in entries.items():
            if not entry.is_accepted:
                continue
            if entry.is_landed or not entry.is_reservation:
                ended.append(work_id)
            elif not entry.is_reported:
                self._count_credit(worker_id, entry, -1)
                self._count_reserved(worker_id, entry, 1)
                entry.is_reported = True
        for work_id in ended:
            self.drop(worker_id, work_id)

    def drop(self, worker_id: WorkerId, work_id: str) -> None:
        """The work ended, or was refused. Idempotent."""
        entries = self._entries.get(worker_id, {})
        entry = entries.pop(work_id, None)
        if entry is None:
            return
        slot = self._table.find(worker_id)
        if entry.bucket is not None and slot is not None:
            self._table.forecast.leave(self._table.rows, slot, entry.bucket, entry.tokens)
        if entry.is_reported:
            self._count_reserved(worker_id, entry, -1)
        else:
            self._count_credit(worker_id, entry, -1)
        if not entries:
            del self._entries[worker_id]

    def of(self, worker_id: WorkerId) -> Credit:
        slot = self._table.find(worker_id)
        return NO_CREDIT if slot is None else self._table.credit(slot)

    def workers(self) -> Iterable[WorkerId]:
        """Return who has credit."""
        return [worker for worker, entries in self._entries.items() if any(not e.is_reported for e in entries.values())]

    def _add(self, worker_id: WorkerId, work_id: str, entry: _Entry, joins_at: float | None) -> None:
        slot = self._table.find(worker_id)
        if self._is_ignored or slot is None:
            return
        self.drop(worker_id, work_id)
        if joins_at is not None:
            entry.bucket = self._table.forecast.join(self._table.rows, slot, joins_at, entry.tokens)
        self._entries.setdefault(worker_id, {})[work_id] = entry
        self._count_credit(worker_id, entry, 1)

    def _count_credit(self, worker_id: WorkerId, entry: _Entry, sign: int) -> None:
        slot = self._table.find(worker_id)
        if slot is None:
            return
        rows, credit = self._table.rows, entry.credit  # column by column: cells of a row take three times as long
        rows["credit_requests"][slot] += sign * credit.num_requests
        rows["credit_prefill_tokens"][slot] += sign * credit.prefill_tokens
        rows["credit_context_tokens"][slot] += sign * credit.context_tokens
        if rows["credit_requests"][slot]:
            rows["credit_prefill_s"][slot] += sign * credit.prefill_s
        else:
            rows["credit_prefill_s"][slot] = 0.0  # no dust of rounding on an idle worker
        if self.on_changed is not None:
            self.on_changed(worker_id)

    def _count_reserved(self, worker_id: WorkerId, entry: _Entry, sign: int) -> None:
        slot = self._table.find(worker_id)
        if slot is not None:
            self._table.rows["own_reserved"][slot] += sign
            self._table.rows["own_reserved_tokens"][slot] += sign * entry.tokens

    def _note_steps(self, worker_id: WorkerId, steps: int) -> None:
        slot = self._table.find(worker_id)
        if slot is not None and steps > 0:
            mean_steps = self._table.rows["mean_steps"]
            mean_steps[slot] += _STEPS_WEIGHT * (steps - mean_steps[slot])

    def _forget(self, slot: int) -> None:
        """The row was cleared: what it counted is gone with the incarnation."""
        worker_id = self._table.slots.worker(slot)
        if worker_id is not None:
            self._entries.pop(worker_id, None)
