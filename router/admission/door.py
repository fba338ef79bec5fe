"""Whether a request is worth entering: what it was promised against what is predicted. Pure.

A request that would miss its targets is refused now, with the time after which asking again makes sense: as long as it
takes until what it would wait too long for is over. When it would miss them on an empty cluster too, waiting does
not help, and the refusal says so.
"""

from dataclasses import dataclass

from core.errors import RejectedError, RejectReason
from router.admission.config import AdmissionConfig, DoorMode
from router.service_terms import ServiceTerms


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted for a request that would enter now.

    Attributes:
        gateway_wait_s: in the gateway's own queue, from arrival.
        ttft_s: from its release there to the first token.
        worker_wait_s: the part of `ttft_s` that is waiting for the workers' earlier requests.
        transfer_s: of KV, after the first token.
        room_wait_s: for blocks to decode in, after that.
        tpot_s: mean gap between later tokens.
        output_tokens: expected length of the answer.
    """

    gateway_wait_s: float
    ttft_s: float
    worker_wait_s: float
    transfer_s: float
    room_wait_s: float
    tpot_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the door says.

    Attributes:
        refusal: the first target that would be missed; None: none.
        is_enforced: the refusal stands; otherwise it is only to be counted.
        ttft_s, total_s: predicted, from arrival.
    """

    refusal: RejectedError | None
    is_enforced: bool
    ttft_s: float
    total_s: float


class Door:
    """Judges by the configuration of the request's class."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config

    def needs_forecast(self, terms: ServiceTerms) -> bool:
        """False: it has no targets, or nobody asks for them; then there is nothing to judge."""
        slo = terms.slo
        has_target = slo.ttft_s is not None or slo.tpot_s is not None or slo.deadline_s is not None
        return has_target and self._config.of(terms.service_class).door is not DoorMode.OFF

    def judge(self, terms: ServiceTerms, forecast: Forecast) -> Verdict:
        """Pure."""
        rules = self._config.of(terms.service_class)
        waits_s = forecast.gateway_wait_s + forecast.worker_wait_s
        ttft_s = forecast.gateway_wait_s + forecast.ttft_s
        gaps_s = forecast.tpot_s * max(0, forecast.output_tokens - 1)
        total_s = ttft_s + forecast.transfer_s + forecast.room_wait_s + gaps_s
        verdict = Verdict(None, rules.door is DoorMode.ENFORCE, ttft_s, total_s)
        if rules.door is DoorMode.OFF:
            return verdict
        allowed = 1.0 + rules.tolerance_ratio
        slo = terms.slo
        targets = (
            (RejectReason.SLO_TTFT, "the first token", slo.ttft_s, ttft_s, waits_s),
            (RejectReason.SLO_TPOT, "each further token", slo.tpot_s, forecast.tpot_s, None),
            (RejectReason.DEADLINE, "the last token", slo.deadline_s, total_s, waits_s + forecast.room_wait_s),
        )
        for reason, what, target_s, predicted_s, passes_s in targets:
            if target_s is not None and predicted_s > target_s * allowed:
                refusal = self._refusal(reason, what, target_s, predicted_s, passes_s, total_s)
                return Verdict(refusal, verdict.is_enforced, ttft_s, total_s)
        return verdict

    def _refusal(
        self,
        reason: RejectReason,
        what: str,
        target_s: float,
        predicted_s: float,
        passes_s: float | None,
        total_s: float,
    ) -> RejectedError:
        """`passes_s`: the part of the prediction that waiting takes away; None: batches must shrink first."""
        detail = f"{what} is expected after {predicted_s:.3g} s, wanted within {target_s:.3g} s"
        excess_s = predicted_s - target_s
        if passes_s is None:
            retry_after_s = total_s * excess_s / predicted_s  # that part of such requests has ended by then
        elif excess_s > passes_s:
            return RejectedError(reason, f"{detail}, which no waiting would bring")
        else:
            retry_after_s = excess_s
        return RejectedError(reason, detail, min(retry_after_s, self._config.max_retry_after_s))
