"""Carries out what request machines ask of workers: orders and aborts, and the books that go with them.

Whatever is sent counts at once as the worker's load (`router.routing.credit`), and its prompt as what the worker's
prefix cache will hold (`router.forwarding.predictions`): the next request of a burst must see neither an idle worker
nor a cold one. What a worker does not keep ends both.
"""

from core.clock import Clock
from core.errors import WorkerLost
from core.ids import WorkerId
from core.membership import Role
from router import messages as m
from router.fleet import Fleet
from router.forwarding.breaker import CircuitBreakers
from router.forwarding.predictions import Predictions
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from router.in_flight import ActiveRequest, InFlight
from router.routing.decision import Decision


class Sender:
    """From machine to port. Every method that sends returns the loss when the worker cannot be reached, else None."""

    def __init__(
        self,
        fleet: Fleet,
        requests: InFlight,
        breakers: CircuitBreakers,
        predictions: Predictions,
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._requests = requests
        self._breakers = breakers
        self._predictions = predictions
        self._clock = clock

    def reserve(self, active: ActiveRequest, effect: m.SubmitDecode) -> m.Event | None:
        """Ask a decode worker for room. The prefill worker, if it was chosen with it, counts as asked from now on."""
        self._requests.begin_attempt(active, effect.attempt)
        record = self._fleet.records.get(effect.worker_id)
        if record is not None:
            active.asked_epochs[effect.worker_id] = record.epoch
        if effect.prefill is not None:
            decision = self._place(active, effect.prefill)
        else:
            assert active.decode_decision is not None, "somebody chose this worker"
            decision = active.decode_decision
            steps = active.claim.expected_output_tokens
            self._fleet.credit.place_decode(active.work_id, decision, self._clock.now(), expected_output_tokens=steps)
        self._predict(active, effect.worker_id)
        order = DecodeOrder(
            active.work_id,
            active.request,
            self._hashes(active, effect.worker_id),
            max_requests_held=decision.max_requests_held if effect.is_conditional else None,
        )
        self._hold(active, effect.worker_id)
        is_sent = self._fleet.workers.submit_decode(effect.worker_id, order)
        return None if is_sent else m.DecodeLost(_unreachable(effect.worker_id))

    def dispatch(self, active: ActiveRequest, effect: m.SubmitPrefill) -> m.Event | None:
        """Give a prompt to a prefill worker."""
        self._requests.begin_attempt(active, effect.attempt)
        decision = self._place(active, effect.worker_id)
        self._hold(active, effect.worker_id)
        decode = self._fleet.records.get(effect.decode) if effect.decode is not None else None
        if effect.decode is not None and decode is None:
            return m.PrefillLost(_unreachable(effect.decode))
        allowed = self._allowed_tokens(active, effect.worker_id, decision) if effect.is_conditional else None
        order = PrefillOrder(
            active.work_id,
            active.request,
            self._hashes(active, effect.worker_id),
            decode,
            decision.winner.held_tokens,
            bind_later=effect.decode is None,
            max_queued_tokens=allowed,
        )
        is_sent = self._fleet.workers.submit_prefill(effect.worker_id, order)
        return None if is_sent else m.PrefillLost(_unreachable(effect.worker_id))

    def engage(self, active: ActiveRequest, effect: m.SubmitAlone) -> m.Event | None:
        """Give a whole request to one worker."""
        self._requests.begin_attempt(active, effect.attempt)
        decision = self._place(active, effect.worker_id)
        self._hold(active, effect.worker_id)
        hashes = self._hashes(active, effect.worker_id)
        max_queued = decision.max_queued_tokens if effect.is_conditional else None
        if effect.role is Role.DECODE:
            max_held = decision.max_requests_held if effect.is_conditional else None
            whole = DecodeOrder(active.work_id, active.request, hashes, True, max_queued, max_held)
            if not self._fleet.workers.submit_decode(effect.worker_id, whole):
                return m.DecodeLost(_unreachable(effect.worker_id))
            return None
        order = PrefillOrder(
            active.work_id,
            active.request,
            hashes,
            cached_tokens=decision.winner.held_tokens,
            max_queued_tokens=max_queued,
        )
        is_sent = self._fleet.workers.submit_prefill(effect.worker_id, order)
        return None if is_sent else m.PrefillLost(_unreachable(effect.worker_id))

    def bind(self, active: ActiveRequest, effect: m.BindPrefill) -> m.Event | None:
        """Tell a prefill worker where its KV goes."""
        decode = self._fleet.records.get(effect.decode) if effect.decode is not None else None
        if effect.decode is not None and decode is None:
            return m.PrefillLost(_unreachable(effect.decode))
        is_sent = self._fleet.workers.bind(effect.worker_id, active.work_id, decode)
        return None if is_sent else m.PrefillLost(_unreachable(effect.worker_id))

    def abort(self, active: ActiveRequest, worker_id: WorkerId, reason: str) -> None:
        """Tell a worker to free what it holds."""
        self._fleet.workers.abort(worker_id, active.work_id, reason)
        self.let_go(active, worker_id)

    def let_go(self, active: ActiveRequest, worker_id: WorkerId) -> None:
        """The worker holds nothing of the request any more."""
        self._fleet.credit.drop(worker_id, active.work_id)
        self._predictions.withdrawn(worker_id, active.work_id)
        self._breakers.withdrawn(worker_id, active.work_id)
        self._requests.let_go(active, worker_id)

    def _hold(self, active: ActiveRequest, worker_id: WorkerId) -> None:
        self._breakers.sent(worker_id, active.work_id)
        self._requests.hold(active, worker_id)

    def _predict(self, active: ActiveRequest, worker_id: WorkerId) -> None:
        self._predictions.sent(worker_id, active.work_id, self._hashes(active, worker_id), self._clock.now())

    def _hashes(self, active: ActiveRequest, worker_id: WorkerId) -> tuple[bytes, ...]:
        """Return the block hashes that this worker's cache is keyed by."""
        return active.hashes.of(self._fleet.hash_key(worker_id))

    def _place(self, active: ActiveRequest, computing: WorkerId) -> Decision:
        """Count all that the placement sends, once: `computing` is the worker that computes the prompt."""
        decision = active.decision
        assert decision is not None, "somebody chose these workers"
        if active.placed is not decision:
            active.placed = decision
            active.queued_tokens = self._queued_tokens(computing)
            steps = active.claim.expected_output_tokens
            self._fleet.credit.place(active.work_id, decision, self._clock.now(), expected_output_tokens=steps)
            self._predict(active, computing)
        return decision

    def _allowed_tokens(self, active: ActiveRequest, worker_id: WorkerId, decision: Decision) -> int | None:
        """Return what may wait at the worker: as decided, plus what this gateway knows to have come there since."""
        allowed = decision.max_queued_tokens
        if allowed is None:
            return None
        since = self._queued_tokens(worker_id) - decision.winner.uncached_tokens - active.queued_tokens
        return allowed + max(0, since)

    def _queued_tokens(self, worker_id: WorkerId) -> int:
        slot = self._fleet.table.find(worker_id)
        if slot is None:
            return 0
        row = self._fleet.table.rows[slot]
        return int(row["queued_tokens"] + row["credit_prefill_tokens"])


def _unreachable(worker_id: WorkerId) -> WorkerLost:
    return WorkerLost(f"{worker_id} is not connected")
