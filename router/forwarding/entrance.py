"""What happens to a request before it enters the queue: what it claims there, and whether it is worth entering.

The door's forecast is the policy's own: where the request would go now, how long it would wait there, how long its
answer becomes by the history of such answers, and how fast the gateway's queue empties.
"""

from core.request import GenerateRequest
from router.admission.claims import Claim, claim_bytes
from router.admission.door import Door, Forecast
from router.admission.output_lengths import LengthKey, OutputLengths
from router.admission.queue import AdmissionQueue
from router.config import RouterConfig
from router.metrics import GatewayMetrics
from router.prompt_hashes import PromptHashes
from router.routing.decision import NoCandidate
from router.routing.placer import Placer
from router.service_terms import ServiceTerms

_LENGTH_QUANTILE = 0.5  # an answer as long as most, not as long as may be: the door must not be shyer than the workers


class Entrance:
    """Claims, forecasts, and the history of output lengths. The caller owns the time."""

    def __init__(self, config: RouterConfig, queue: AdmissionQueue, placer: Placer, metrics: GatewayMetrics) -> None:
        self._queue = queue
        self._placer = placer
        self._metrics = metrics
        self._door = Door(config.admission)
        self.output_lengths = OutputLengths(config.admission.output_lengths, config.routing.expected_output_tokens)

    def expected_output_tokens(self, request: GenerateRequest, service: ServiceTerms) -> int:
        """Predict how long the answer becomes."""
        return self.output_lengths.quantile(_length_key(request, service), _LENGTH_QUANTILE)

    def claim(self, request: GenerateRequest, service: ServiceTerms, arrived_at: float) -> Claim:
        """Return what the request claims in the queue."""
        return Claim(
            request.request_id,
            request.tenant,
            service.service_class,
            service.priority,
            service.slo.deadline_s,
            arrived_at,
            request.num_prompt_tokens,
            claim_bytes(request),
            self.expected_output_tokens(request, service),
        )

    def check_door(
        self, request: GenerateRequest, hashes: PromptHashes, service: ServiceTerms, claim: Claim, now: float
    ) -> None:
        """Raises: RejectedError, when by all that is known the request would miss its targets."""
        if not self._door.needs_forecast(service):
            return
        decision = self._placer.forecast(
            request,
            hashes,
            slo=service.slo,
            expected_output_tokens=claim.expected_output_tokens,
        )
        if isinstance(decision, NoCandidate):
            return  # nobody can be asked now: the queue and its time limit decide
        waited_s = now - claim.arrived_at
        forecast = Forecast(
            gateway_wait_s=waited_s + self._queue.expected_wait_s(claim, now),
            ttft_s=decision.winner.ready_in_s,
            worker_wait_s=decision.terms.queue_s,
            transfer_s=decision.terms.transfer_s,
            room_wait_s=decision.winner.room_s,
            tpot_s=decision.tpot_s,
            output_tokens=claim.expected_output_tokens,
        )
        verdict = self._door.judge(service, forecast)
        if verdict.refusal is not None:
            self._metrics.missed(verdict.refusal, is_enforced=verdict.is_enforced)
            if verdict.is_enforced:
                raise verdict.refusal

    def ended_well(self, request: GenerateRequest, service: ServiceTerms, num_tokens: int, now: float) -> None:
        """The answer had so many tokens."""
        self.output_lengths.record(_length_key(request, service), num_tokens, now)


def _length_key(request: GenerateRequest, service: ServiceTerms) -> LengthKey:
    return LengthKey(request.tenant, service.service_class, request.sampling.max_tokens)
