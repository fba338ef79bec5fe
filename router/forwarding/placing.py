"""Asks the policy on behalf of a request machine, and turns what it answers into the machine's event."""

import random

from core.clock import Clock
from core.errors import PromptTooLong
from core.ids import WorkerId
from router import messages as m
from router.config import RouterConfig
from router.fleet import Fleet
from router.forwarding.affinity import SessionAffinity
from router.in_flight import ActiveRequest
from router.metrics import GatewayMetrics
from router.routing.decision import Decision, NoCandidate, Obstacle
from router.routing.modes import Binding, Mode
from router.routing.placer import Placer
from router.routing.query import NO_SESSION, Session


class Placing:
    """From questions of machines to events. The decision is left in the `ActiveRequest`."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        placer: Placer,
        affinity: SessionAffinity,
        clock: Clock,
        rng: random.Random,
        metrics: GatewayMetrics,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._placer = placer
        self._affinity = affinity
        self._clock = clock
        self._rng = rng
        self._metrics = metrics

    def choose(
        self,
        active: ActiveRequest,
        refused: frozenset[WorkerId],
        reserved_decode: WorkerId | None = None,
        *,
        allow_late: bool = False,
    ) -> m.Event:
        """Choose workers, or only a prefill worker for the decode worker that has accepted."""
        if self._are_enough(refused):
            return self._nobody(active, m.NothingFits(f"{len(refused)} workers refused"))
        now = self._clock.now()
        request, service = active.request, active.service
        outcome = self._placer.place(
            request,
            active.hashes,
            waited_s=now - active.claim.arrived_at,
            slo=service.slo,
            expected_output_tokens=active.claim.expected_output_tokens,
            refused=refused,
            reserved_decode=reserved_decode,
            session=self._session(active, now),
            allow_late=allow_late and not active.machine.is_too_long,
        )
        if isinstance(outcome, NoCandidate):
            if outcome.obstacle is Obstacle.TOO_LONG:
                return _too_long(active)
            return self._nobody(active, m.NothingFits(f"{outcome.role}: {outcome.obstacle}"))
        active.decision, active.decided_at = outcome, now
        self._metrics.decided(outcome)
        return m.PrefillChosen(_known(outcome.prefill)) if reserved_decode is not None else _event(outcome)

    def choose_decode(self, active: ActiveRequest, effect: m.ChooseDecode) -> m.Event:
        """Choose a decode worker for a prompt that is being computed, or waits as KV."""
        refused = self._still_refused(active, effect.refused)
        if self._are_enough(refused):
            return self._look_later(effect)
        now = self._clock.now()
        request, service = active.request, active.service
        decision = active.decision
        assert decision is not None, "somebody chose the prefill worker"
        has_begun = active.machine.num_tokens > 0
        remaining_s = 0.0 if has_begun else max(0.0, decision.winner.ready_in_s - (now - active.decided_at))
        outcome = self._placer.place_decode(
            request,
            active.hashes,
            prefill=effect.prefill,
            remaining_prefill_s=remaining_s,
            waited_s=now - active.claim.arrived_at,
            slo=service.slo,
            expected_output_tokens=active.claim.expected_output_tokens,
            refused=refused,
            session=self._session(active, now),
        )
        if isinstance(outcome, NoCandidate):
            return self._look_later(effect)
        active.decode_decision = outcome
        self._metrics.decided(outcome)
        return m.DecodeChosen(_known(outcome.decode))

    def bind_session(self, active: ActiveRequest) -> None:
        """The workers that the request has now accepted it."""
        key, machine = _session_key(active), active.machine
        if key:
            self._affinity.bind(key, machine.prefill, machine.decode, self._clock.now())

    def _session(self, active: ActiveRequest, now: float) -> Session:
        key = _session_key(active)
        binding = self._affinity.of(key, now) if key else None
        return NO_SESSION if binding is None else Session(binding.prefill, binding.decode)

    def _are_enough(self, refused: frozenset[WorkerId]) -> bool:
        """Asking every worker there is would burden a full cluster, and the more so the larger it is."""
        return len(refused) >= self._config.forwarding.max_refusals

    def _still_refused(self, active: ActiveRequest, refused: frozenset[WorkerId]) -> frozenset[WorkerId]:
        """Leave out who has restarted since it was asked: the new incarnation never heard of this work."""
        records, asked = self._fleet.records, active.asked_epochs
        return frozenset(
            worker_id
            for worker_id in refused
            if worker_id not in asked or worker_id not in records or records[worker_id].epoch == asked[worker_id]
        )

    def _look_later(self, effect: m.ChooseDecode) -> m.Event:
        longest_s = min(self._config.retry_max_s, self._config.retry_min_s * 2.0 ** min(effect.num_seeks, 32))
        return m.DecodeUnavailable(longest_s * self._rng.uniform(0.5, 1.0))

    def _nobody(self, active: ActiveRequest, nothing: m.NothingFits) -> m.Event:
        return _too_long(active) if active.machine.is_too_long else nothing


def _session_key(active: ActiveRequest) -> str:
    """Two tenants may call their sessions alike. A tenant's name has no slash."""
    session_id = active.service.session_id
    return f"{active.request.tenant}/{session_id}" if session_id else ""


def _too_long(active: ActiveRequest) -> m.RequestFailed:
    request = active.request
    total = request.num_prompt_tokens + request.sampling.max_tokens
    return m.RequestFailed(PromptTooLong("prompt", f"no worker can hold a request of {total} tokens"))


def _event(decision: Decision) -> m.Event:
    if decision.mode is not Mode.REMOTE_PREFILL:
        if decision.prefill is not None:
            return m.PrefillAloneChosen(decision.prefill)
        return m.DecodeAloneChosen(_known(decision.decode))
    if decision.binding is Binding.LATE:
        return m.LateChosen(_known(decision.prefill))
    return m.PairChosen(_known(decision.prefill), _known(decision.decode))


def _known(worker_id: WorkerId | None) -> WorkerId:
    assert worker_id is not None, "the mode of the decision needs this worker"
    return worker_id
