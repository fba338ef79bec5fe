"""Explanations as wire messages. Pure."""

from dataclasses import asdict

from protos import admin_pb2 as pb
from router.explain.ring import ExplainedDecision
from router.routing.decision import Candidate


def decision_to_wire(one: ExplainedDecision, now: float) -> pb.RouteDecision:
    """`now`: of the clock that the decision was made by."""
    decision = one.decision
    wire = pb.RouteDecision(
        request_id=one.request_id,
        age_s=max(0.0, now - one.decided_at),
        mode=decision.mode,
        mode_reason=decision.mode_reason,
        reason=decision.reason,
        binding=decision.binding,
        winner=_candidate(decision.winner),
        candidates=[_candidate(candidate) for candidate in decision.candidates()],
        staleness_s=decision.staleness_s,
        num_prompt_tokens=one.num_prompt_tokens,
        expected_output_tokens=one.expected_output_tokens,
        num_eligible=decision.num_eligible,
        decision_s=decision.decision_s,
    )
    outcome, hindsight = one.outcome, one.hindsight()
    if outcome is not None:
        wire.outcome.ttft_s = outcome.ttft_s
        wire.outcome.tpot_s = outcome.tpot_s
        wire.outcome.transfer_s = outcome.transfer_s
        wire.outcome.failure = outcome.failure
    if hindsight is not None:
        wire.outcome.ttft_error_s = hindsight.ttft_error_s
        wire.outcome.regret_s = hindsight.regret_s
    return wire


def _candidate(candidate: Candidate) -> pb.RouteCandidate:
    return pb.RouteCandidate(
        prefill_worker=candidate.prefill or "",
        decode_worker=candidate.decode or "",
        mode=candidate.mode,
        total_s=candidate.terms.total_s,
        terms_s=asdict(candidate.terms),
        predicted_ttft_s=candidate.ttft_s,
        predicted_tpot_s=candidate.tpot_s,
        held_tokens=candidate.held_tokens,
    )
