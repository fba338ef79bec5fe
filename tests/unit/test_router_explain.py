"""Why a request went where it went, and what came of it: the ring and the arithmetic of regret."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import RequestId
from router.explain.outcome import RouteOutcome, judge
from router.explain.ring import ExplanationRing
from router.routing.columns import CANDIDATE, TERM_NAMES
from router.routing.decision import CandidateList, Decision
from tests.routing_world import START, World

R = RequestId("r")
REMOTE: dict[str, Any] = {"modes": ["remote_prefill"]}


def decide(*names: str) -> Decision:
    world = World(*names, **REMOTE)
    for idx, name in enumerate(names):
        world.set(name, queued_tokens=1000 * idx)
    return world.place()


def test_regret_is_what_it_turned_out_to_cost_less_the_best_other_prediction() -> None:
    decision = decide("p1", "p2", "d1")
    winner, other = decision.candidates()[:2]
    assert (winner.prefill, other.prefill) == ("p1", "p2")
    as_expected = RouteOutcome(winner.ttft_s, winner.tpot_s, winner.terms.transfer_s)
    hindsight = judge(decision, as_expected, 64)
    assert hindsight.ttft_error_s == pytest.approx(0.0)
    assert hindsight.cost_error_s == pytest.approx(0.0)
    assert hindsight.regret_s == pytest.approx(winner.terms.total_s - other.terms.total_s)
    assert hindsight.regret_s < 0.0
    worse = RouteOutcome(winner.ttft_s + 1.0, winner.tpot_s + 0.01, winner.terms.transfer_s + 0.5)
    assert judge(decision, worse, 64).ttft_error_s == pytest.approx(1.0)
    assert judge(decision, worse, 64).cost_error_s == pytest.approx(1.0 + 0.64 + 0.5)
    assert judge(decision, worse, 64).regret_s == pytest.approx(hindsight.regret_s + 2.14)


def test_without_another_candidate_there_is_nothing_to_regret() -> None:
    decision = decide("p1", "d1")
    hindsight = judge(decision, RouteOutcome(decision.ttft_s + 1.0), 64)
    assert hindsight.regret_s == 0.0
    assert hindsight.cost_error_s == pytest.approx(1.0 - decision.terms.transfer_s), "one token: no step was seen"


def test_candidates_are_read_when_somebody_asks() -> None:
    decision = decide("p1", "p2", "d1", "d2")
    candidates = decision.candidates()
    assert candidates[0] == decision.winner
    assert len(candidates) == 4
    assert [one.terms.total_s for one in candidates] == sorted(one.terms.total_s for one in candidates)
    for position, one in enumerate(candidates):
        row = np.frombuffer(decision.ranked.data, CANDIDATE)[position]
        assert [getattr(one.terms, name) for name in TERM_NAMES] == [row[name] for name in TERM_NAMES]
        assert one.terms.total_s == pytest.approx(row["total_s"], abs=4e-9)
        for name in ("ttft_s", "tpot_s", "transfer_total_s", "room_s", "ready_in_s", "compute_s", "held_tokens"):
            assert getattr(one, name) == row[name], name


def test_the_outcome_belongs_to_the_decision_that_was_carried_out() -> None:
    ring, decision = ExplanationRing(10**6), decide("p1", "p2", "d1")
    ring.add(R, decision, START, 1000, 64)
    ring.add(R, decision, START + 1, 1000, 64)
    assert ring.observed(RequestId("nobody"), RouteOutcome(1.0)) is None
    carried_out = ring.observed(R, RouteOutcome(1.0, 0.01))
    first, second = ring.of(R)
    assert carried_out is second
    assert (first.outcome, first.hindsight()) == (None, None)
    assert second.hindsight() is not None
    ring.add(R, decision, START + 2, 1000, 64)
    failed = ring.observed(R, RouteOutcome(1.0, failure="lost"))
    assert failed is not None
    assert failed.hindsight() is None, "what failed says nothing about seconds"
    assert [one.decided_at for one in ring.last(5)] == [START + 2, START + 1, START]
    assert ring.of(RequestId("nobody")) == []


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(4096, 40_000))
def test_the_ring_is_bounded_in_bytes_and_drops_the_oldest(requests: list[int], max_bytes: int) -> None:
    decision = decide("p1", "p2", "d1")
    ring = ExplanationRing(max_bytes)
    for at, number in enumerate(requests):
        ring.add(RequestId(f"r{number}"), decision, float(at), 10, 10)
        ring.check()
    kept = [one.decided_at for one in ring.last(1000)]
    assert kept == [float(at) for at in range(len(requests))][::-1][: len(kept)]
    if requests and decision.ranked.num_bytes + 1500 <= max_bytes:
        assert len(ring) >= 1


def test_a_candidate_without_a_name_any_more_is_nobody() -> None:
    decision = decide("p1", "d1")
    assert CandidateList(decision.ranked.data, {}).at(0).prefill is None


def test_an_outcome_is_of_one_request_only() -> None:
    """A client may use an id again; a request that ends in the queue says nothing of its namesake's decisions."""
    ring, decision = ExplanationRing(10**6), decide("p1", "p2", "d1")
    ring.add(R, decision, START, 1000, 64)
    ended = RouteOutcome(1.0, 0.01)
    assert ring.observed(R, ended) is not None
    assert ring.observed(R, RouteOutcome(0.0, failure="RejectedError")) is None
    assert ring.of(R)[0].outcome == ended
    ring.add(R, decision, START + 9, 1000, 64)
    assert ring.observed(R, RouteOutcome(2.0)) is ring.of(R)[1]


def test_what_is_decided_after_the_first_token_did_not_predict_it() -> None:
    """A decode worker that is chosen late, or anew after a loss."""
    world = World("p1", "p2", "d1", **REMOTE)
    query = replace(world.query(), waited_s=3.0)
    decision = world.place(query)
    winner = decision.winner
    hindsight = judge(decision, RouteOutcome(1.0, winner.tpot_s, winner.terms.transfer_s), 64)
    assert (hindsight.ttft_error_s, hindsight.cost_error_s) == pytest.approx((0.0, 0.0))
    assert hindsight.regret_s == pytest.approx(winner.terms.total_s - decision.candidates()[1].terms.total_s)
    early = judge(decision, RouteOutcome(3.0 + winner.ready_in_s / 2, winner.tpot_s, winner.terms.transfer_s), 64)
    assert early.ttft_error_s == pytest.approx(-winner.ready_in_s / 2)
