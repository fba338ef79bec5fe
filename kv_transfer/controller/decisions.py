"""Decisions: what was chosen, of what, why, what was expected and what came of it; kept in a ring for an admin call."""

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kv_transfer.choice import TransferObservation, TransferQuestion

Json = dict[str, object]


class DecisionReason(StrEnum):
    """Why this profile. Labels the metrics, so the set is closed."""

    NO_PROFILES = "no_profiles"  # there is only `none`
    ONLY_ALLOWED = "only_allowed"  # the floor, or cooldowns, left one
    FASTEST = "fastest"
    KEPT = "kept"  # the last one here; another promises less than the hysteresis
    LESS_LOSSY = "less_lossy"  # within the margin of the fastest
    HIDDEN = "hidden"  # behind the prefill, as the fastest would be; and less lossy
    TRIED = "tried"  # might be faster; to learn
    BUDGET_MISSED = "budget_missed"  # nothing allowed is expected to meet the budget: the fastest
    UNMEASURED_LINK = "unmeasured_link"  # the fastest if the link is as the prior says
    STATIC = "static"  # configured
    STATIC_BELOW_FLOOR = "static_below_floor"  # the configured one is not good enough for this request


class Candidate(NamedTuple):  # made four times per decision: a third of a frozen dataclass's time
    """The terms of one arm that was considered. Seconds.

    Attributes:
        model_s: what the model alone says, reserved to acknowledged.
        predicted_s: after what experience says.
        crowding_s: price of the delay for others.
        doubt: standard deviation of the logarithm of the exposed time; 0 for what is not to be tried anyway.
        codec_factor, wire_factor, residual: of experience: the last multiplies the exposed time.
    """

    profile: str
    model_s: float
    predicted_s: float
    crowding_s: float
    encode_s: float
    wire_s: float
    decode_s: float
    doubt: float
    codec_factor: float
    wire_factor: float
    residual: float
    is_hidden: bool


class Decision(NamedTuple):
    """One answer of a policy.

    Attributes:
        goodput_bytes_per_s: that the terms were computed with; a prior when `is_prior`.
        queue_s, encode_backlog_s: until the wire and the codec threads are free of earlier transfers.
        meets_budget: the chosen one is expected to; True when there is none.
    """

    question: TransferQuestion
    at_s: float
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    reason: DecisionReason
    goodput_bytes_per_s: float
    is_prior: bool
    queue_s: float
    encode_backlog_s: float
    meets_budget: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a decision.

    Attributes:
        regret_s: how much longer it took than the best candidate would have, by the model as it is after learning.
    """

    observation: TransferObservation
    at_s: float
    regret_s: float


class DecisionRing:
    """The last decisions with their outcomes. Bounded; the oldest go."""

    def __init__(self, max_decisions: int) -> None:
        self._max = max_decisions
        self._decisions: OrderedDict[str, tuple[Decision, Outcome | None]] = OrderedDict()

    def add(self, decision: Decision) -> None:
        self._decisions[decision.question.transfer_id] = (decision, None)
        if len(self._decisions) > self._max:
            self._decisions.popitem(last=False)

    def add_outcome(self, decision: Decision, outcome: Outcome) -> None:
        """Attach an outcome, unless its decision has left the ring."""
        transfer_id = decision.question.transfer_id
        if transfer_id in self._decisions:
            self._decisions[transfer_id] = (decision, outcome)

    def view(self, last: int, now: float) -> list[Json]:
        """Return the `last` decisions as plain values, newest first; times are ages in seconds at `now`."""
        newest = list(reversed(self._decisions.values()))[: max(0, last)]
        return [_as_json(decision, outcome, now) for decision, outcome in newest]


def _as_json(decision: Decision, outcome: Outcome | None, now: float) -> Json:
    question, terms, link = decision.question, decision.question.terms, decision.question.link
    view: Json = {
        "transfer_id": question.transfer_id,
        "request_id": question.request_id,
        "peer": question.peer,
        "age_s": now - decision.at_s,
        "profile": decision.chosen.profile,
        "reason": str(decision.reason),
        "predicted_s": decision.chosen.predicted_s,
        "raw_bytes": question.raw_bytes,
        "num_tokens": question.num_tokens,
        "tenant": terms.tenant,
        "quality_floor": terms.quality_floor,
        "budget_s": terms.budget_s,
        "compute_s": terms.compute_s,
        "carrier": link.carrier,
        "goodput_bytes_per_s": decision.goodput_bytes_per_s,
        "is_prior": decision.is_prior,
        "rtt_s": link.rtt_s,
        "queued_bytes": link.queued_bytes,
        "queue_s": decision.queue_s,
        "encode_backlog_s": decision.encode_backlog_s,
        "meets_budget": decision.meets_budget,
        "candidates": [_candidate_json(candidate) for candidate in decision.candidates],
        "outcome": None,
    }
    if outcome is not None:
        seen = outcome.observation
        view["outcome"] = {
            "observed_s": seen.observed_s,
            "exposed_s": seen.exposed_s,
            "payload_bytes": seen.payload_bytes,
            "ratio": seen.raw_bytes / seen.payload_bytes if seen.payload_bytes else None,
            "failure": seen.failure,
            "regret_s": outcome.regret_s,
        }
    return view


def _candidate_json(candidate: Candidate) -> Json:
    return {
        "profile": candidate.profile,
        "model_s": candidate.model_s,
        "predicted_s": candidate.predicted_s,
        "crowding_s": candidate.crowding_s,
        "encode_s": candidate.encode_s,
        "wire_s": candidate.wire_s,
        "decode_s": candidate.decode_s,
        "doubt": candidate.doubt,
        "codec_factor": candidate.codec_factor,
        "wire_factor": candidate.wire_factor,
        "residual": candidate.residual,
        "is_hidden": candidate.is_hidden,
    }
