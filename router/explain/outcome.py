"""What came of a decision, against what it expected and against what the next best was expected to cost. Pure."""

from dataclasses import dataclass

from router.routing.decision import Candidate, Decision


@dataclass(frozen=True, slots=True)
class RouteOutcome:
    """As observed; seconds.

    Attributes:
        ttft_s: arrival to first token.
        tpot_s: mean gap between tokens after the first; 0: there were none.
        transfer_s: exposed part of the KV hand-off; 0: there was none.
        failure: empty when the request ended well.
    """

    ttft_s: float
    tpot_s: float = 0.0
    transfer_s: float = 0.0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Hindsight:
    """Seconds; of a decision whose request ended well.

    Attributes:
        ttft_error_s: observed less predicted time to first token; 0 for what was decided after that.
        cost_error_s: what the placement turned out to cost, less what it was predicted to.
        regret_s: what it turned out to cost, less what the best other candidate was predicted to: negative when even in
            hindsight the choice was right by the knowledge of the time. 0 without another candidate.
    """

    ttft_error_s: float
    cost_error_s: float
    regret_s: float


def judge(decision: Decision, outcome: RouteOutcome, expected_output_tokens: int) -> Hindsight:
    """Compare. The parts of the cost that cannot be observed (targets, handicaps) count as predicted. Pure."""
    winner = decision.winner
    decided_s = winner.ttft_s - winner.ready_in_s  # after arrival
    ttft_error_s = outcome.ttft_s - winner.ttft_s if outcome.ttft_s >= decided_s else 0.0
    transfer_error_s = outcome.transfer_s - winner.terms.transfer_s
    has_decoded = outcome.tpot_s > 0.0 and winner.tpot_s > 0.0
    decode_error_s = expected_output_tokens * (outcome.tpot_s - winner.tpot_s) if has_decoded else 0.0
    cost_error_s = ttft_error_s + transfer_error_s + decode_error_s
    best_other = _best_other(decision)
    regret_s = winner.terms.total_s + cost_error_s - best_other.terms.total_s if best_other is not None else 0.0
    return Hindsight(ttft_error_s, cost_error_s, regret_s)


def _best_other(decision: Decision) -> Candidate | None:
    """Return the cheapest candidate that is not the winner; they are ranked."""
    winner = decision.winner
    mine = (winner.mode, winner.prefill, winner.decode)
    for position in range(len(decision.ranked)):
        one = decision.ranked.at(position)
        if (one.mode, one.prefill, one.decode) != mine:
            return one
    return None
