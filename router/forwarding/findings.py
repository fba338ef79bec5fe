"""What the reports of workers teach: credit that is used up, models of machines and links, breakers, explanations."""

from core.errors import ServingError
from core.ids import WorkerId
from router import messages as m
from router.explain.outcome import RouteOutcome
from router.explain.ring import ExplanationRing
from router.fleet import Fleet
from router.forwarding.breaker import CircuitBreakers
from router.forwarding.predictions import Predictions
from router.in_flight import ActiveRequest
from router.metrics import GatewayMetrics


class Findings:
    """Told of every event of a living work before its machine is, and of how each request ended."""

    def __init__(
        self,
        fleet: Fleet,
        breakers: CircuitBreakers,
        predictions: Predictions,
        explanations: ExplanationRing,
        metrics: GatewayMetrics,
    ) -> None:
        self._fleet = fleet
        self._breakers = breakers
        self._predictions = predictions
        self._explanations = explanations
        self._metrics = metrics

    def note(self, worker_id: WorkerId, active: ActiveRequest, event: m.Event, now: float) -> None:
        """`worker_id` told of `event`."""
        work_id, fleet, machine = active.work_id, self._fleet, active.machine
        match event:
            case m.DecodeProduced() if machine.num_tokens:
                return
            case m.DecodeAccepted(load=load) | m.PrefillAccepted(load=load):
                fleet.credit.accepted(worker_id, work_id)
                if load is not None:
                    fleet.apply_load(worker_id, load)
            case m.DecodeRejected(error, load) | m.PrefillRejected(error, load):
                self._metrics.refused(error)
                fleet.credit.drop(worker_id, work_id)  # its load tells of all that it holds, and this is not held
                if load is not None:
                    fleet.apply_load(worker_id, load)
            case m.PrefillProduced() | m.PrefillFinished() | m.DecodeProduced() | m.DecodeFinished():
                if machine.num_tokens == 0:
                    fleet.credit.computed(worker_id, work_id)
                    self._predictions.came_true(worker_id, work_id)
                    if machine.decode is None or machine.prefill is None:  # alone: nothing else will prove it
                        self._breakers.proved(worker_id)
            case m.PrefillMeasured(compute_s=compute_s, cached_tokens=cached_tokens):
                num_tokens = active.request.num_prompt_tokens
                fleet.models.observe_prefill(worker_id, num_tokens, cached_tokens, compute_s)
            case m.KvHandedOver(goodput, rtt_s, queued_bytes):
                self._breakers.proved(worker_id)
                if machine.decode is not None:
                    fleet.models.observe_link(worker_id, machine.decode, goodput, rtt_s, queued_bytes)
            case m.KvLanded():
                self._landed(worker_id, active, event)
            case m.PrefillLost() | m.DecodeLost():
                self._breakers.failed(worker_id, now)
            case _:
                pass

    def concluded(self, active: ActiveRequest, error: ServingError | None, now: float) -> None:
        """The request is over."""
        machine = active.machine
        split = machine.timeline.split(machine.num_tokens, now)
        exposed_s = machine.landed.exposed_s if machine.landed is not None else 0.0
        failure = "" if error is None else type(error).__name__
        outcome = RouteOutcome(split.ttft_s, split.tpot_s, exposed_s, failure)
        explained = self._explanations.observed(active.request_id, outcome)
        hindsight = explained.hindsight() if explained is not None else None
        if hindsight is not None:
            self._metrics.judged(hindsight)

    def _landed(self, worker_id: WorkerId, active: ActiveRequest, event: m.KvLanded) -> None:
        self._fleet.credit.landed(worker_id, active.work_id)
        self._predictions.came_true(worker_id, active.work_id)
        self._breakers.proved(worker_id)
        prefill = active.machine.prefill_worker
        if prefill is None:
            return
        decision = active.decode_decision if active.machine.is_late else active.decision
        self._fleet.models.observe_transfer(
            prefill,
            worker_id,
            quality_floor=active.request.kv_quality_floor,
            kv_bytes=event.kv_bytes,
            wire_bytes=event.kv_wire_bytes,
            exposed_s=event.exposed_s,
            predicted_s=decision.terms.transfer_s if decision is not None else None,
        )
