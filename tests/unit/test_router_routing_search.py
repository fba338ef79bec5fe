"""The search over pairs and modes against the same cost written down without one; and that slots decide nothing."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.ids import WorkerId
from core.membership import Role, WorkerRecord
from core.service_class import Slo
from router.routing.decision import Decision, NoCandidate
from router.routing.modes import Mode
from router.routing.query import RouteQuery, Session
from tests.routing_reference import Placement, Reference
from tests.routing_world import World, load_report, record

places = st.sampled_from(["", "one", "two"])
tokens = st.integers(0, 5000)


@st.composite
def workers(draw: st.DrawFn, role: str, most: int) -> list[WorkerRecord]:
    names = [f"{role}{idx}" for idx in range(draw(st.integers(1, most)))]
    return [
        record(
            name,
            layout_fingerprint=draw(st.sampled_from(["a", "a", "a", "b"])),
            host=draw(places),
            rack=draw(places),
            zone=draw(places),
            kv_bytes_per_token=draw(st.sampled_from([1000, 100_000])),
            load=load_report(
                queued_prefill_tokens=draw(tokens),
                num_running=draw(st.integers(0, 30)),
                context_tokens=draw(tokens),
                num_waiting=draw(st.integers(3, 6)),
                num_reserved=draw(st.integers(0, 3)),
                reserved_tokens=draw(tokens),
                free_blocks=draw(st.sampled_from([0, 10, 60, 3000])),
            ),
        )
        for name in names
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[WorkerRecord], dict[str, Any], dict[str, Any]]:
    members = draw(workers("p", 4)) + draw(workers("d", 4))
    names = [worker.worker_id for worker in members]
    some = st.none() | st.floats(0.001, 2.0)
    config = {
        "modes": draw(st.sampled_from([tuple(Mode), (Mode.REMOTE_PREFILL,), (Mode.REMOTE_PREFILL, Mode.COLOCATED)])),
        "late_binding": False,
        "candidates_kept": 64,
        "stall_weight": draw(st.sampled_from([0.0, 0.25])),
    }
    query = {
        "held": {name: draw(st.integers(0, 1200)) for name in names if draw(st.booleans())},
        "in_host": {name: draw(st.integers(0, 1200)) for name in names if draw(st.booleans())},
        "hot": (draw(st.integers(0, 900)), draw(st.floats(0.0, 50.0))),
        "slo": Slo(draw(some), draw(some), draw(some)),
        "waited_s": draw(st.floats(0.0, 1.0)),
        "reuses_prefix": draw(st.booleans()),
        "expected_output_tokens": draw(st.integers(1, 500)),
        "quality_floor": draw(st.sampled_from([1.0, 0.99, 0.97, 0.0])),
        "session": Session(draw(st.sampled_from([None, *names[:1]])), draw(st.sampled_from([None, *names[-1:]]))),
    }
    return members, config, query


def judge(world: World, query: RouteQuery) -> list[tuple[Placement, float]]:
    outcome = world.ask(query)
    if isinstance(outcome, NoCandidate):
        return []
    return [((one.mode, one.prefill, one.decode), one.terms.total_s) for one in outcome.candidates()]


@settings(deadline=None, max_examples=150)
@given(cases())
def test_the_search_finds_what_trying_everything_finds(
    case: tuple[list[WorkerRecord], dict[str, Any], dict[str, Any]],
) -> None:
    members, config, fields = case
    world = World(*members, **config)
    world.models.links.classes["residual"][:] = [[1.0, 0.5, 2.0, 1.5]] * 4
    world.models.links.classes["ratio"][:] = [[1.4, 2.0, 4.0, 6.0]] * 4
    query = world.query(**fields)
    expected = Reference(world, query, {worker.worker_id: worker.role for worker in members}).totals()
    found = judge(world, query)
    assert len(found) == min(len(expected), 64)
    for placement, total_s in found:
        assert total_s == pytest.approx(expected[placement], rel=1e-9, abs=1e-9)
    assert [total for _, total in found] == pytest.approx(sorted(expected.values())[:64], rel=1e-9, abs=4e-9)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 3))
def test_a_short_list_holds_the_same_winners_as_a_long_one(
    case: tuple[list[WorkerRecord], dict[str, Any], dict[str, Any]], kept: int
) -> None:
    """The short list is where the search may skip pairs."""
    members, config, fields = case
    world = World(*members, **config)
    short = World(*members, **{**config, "candidates_kept": kept + 1})
    totals = [total for _, total in judge(short, short.query(**fields))]
    assert totals == pytest.approx([total for _, total in judge(world, world.query(**fields))][: kept + 1], abs=4e-9)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_how_much_the_winner_may_be_off_is_the_lead_over_the_best_without_it(
    case: tuple[list[WorkerRecord], dict[str, Any], dict[str, Any]],
) -> None:
    members, config, fields = case
    world = World(*members, **{**config, "submit_slack_s": 0.0})
    query = world.query(**fields)
    decision = world.ask(query)
    assume(isinstance(decision, Decision))
    assert isinstance(decision, Decision)
    totals = Reference(world, query, {worker.worker_id: worker.role for worker in members}).totals()
    winner = decision.winner
    computes, decodes = winner.prefill or winner.decode, winner.decode or winner.prefill
    elsewhere = [total for (_, p, d), total in totals.items() if (p or d) != computes and computes not in (p, d)]
    apart = [total for (_, p, d), total in totals.items() if (d or p) != decodes and decodes not in (p, d)]
    best = min(totals.values())
    if decision.mode is Mode.REMOTE_PREFILL:
        assert decision.prefill_slack_s == pytest.approx(min(elsewhere, default=np.inf) - best, rel=1e-7, abs=1e-8)
        assert decision.decode_slack_s == pytest.approx(min(apart, default=np.inf) - best, rel=1e-7, abs=1e-8)
    assert (decision.max_queued_tokens is None) == (decision.prefill_slack_s == np.inf)


@settings(deadline=None, max_examples=40)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_workers_does_not_matter(
    case: tuple[list[WorkerRecord], dict[str, Any], dict[str, Any]], rng: random.Random
) -> None:
    members, config, fields = case
    shuffled = list(members)
    rng.shuffle(shuffled)
    one, other = World(*members, **config), World(*shuffled, **config)
    a, b = judge(one, one.query(**fields)), judge(other, other.query(**fields))
    assert [total for _, total in a] == pytest.approx([total for _, total in b], rel=1e-9, abs=4e-9)
    unique = [total for _, total in a][1:2] > [a[0][1] + 1e-7] if len(a) > 1 else True
    if a and unique:
        assert a[0][0] == b[0][0]


def test_equal_workers_are_drawn_evenly() -> None:
    world = World(*[f"p{idx}" for idx in range(5)], *[f"d{idx}" for idx in range(5)])
    wins = Counter[WorkerId | None]()
    for _ in range(1000):
        decision = world.place()
        wins.update([decision.prefill, decision.decode])
    assert len(wins) == 10
    assert all(140 < count < 260 for count in wins.values()), wins


def test_the_search_stays_exact_within_the_cheapest_of_each_role() -> None:
    """Of 200 workers only 10 of each role are paired: the winner's own sides are among them."""
    rng = np.random.default_rng(3)
    members = [
        record(
            f"{role}{idx}",
            load=load_report(
                queued_prefill_tokens=int(rng.integers(20_000)),
                num_running=int(rng.integers(60)),
                context_tokens=int(rng.integers(90_000)),
            ),
        )
        for role in "pd"
        for idx in range(100)
    ]
    few, all_of_them = World(*members, candidates_per_role=10), World(*members, candidates_per_role=100)
    found, expected = judge(few, few.query())[:3], judge(all_of_them, all_of_them.query())[:3]
    assert [placement for placement, _ in found] == [placement for placement, _ in expected]
    assert [total for _, total in found] == pytest.approx([total for _, total in expected], abs=4e-9)


def test_pairs_need_the_same_layout_and_every_layout_gets_its_chance() -> None:
    """The cheapest prefill workers and the cheapest decode workers may have no layout in common."""
    prefills = [record(f"p{idx}", layout_fingerprint="a") for idx in range(4)]
    decodes = [record(f"d{idx}", layout_fingerprint="b") for idx in range(4)]
    busy = load_report(queued_prefill_tokens=50_000, num_running=50)
    world = World(
        *prefills,
        *decodes,
        record("p_b", layout_fingerprint="b", load=busy),
        record("d_a", layout_fingerprint="a", load=busy),
        modes=["remote_prefill"],
        candidates_per_role=2,
    )
    for _ in range(20):
        decision = world.place()
        assert decision.decode == "d_a"
        assert decision.prefill in {"p0", "p1", "p2", "p3"}


def test_no_layout_in_common_is_told() -> None:
    world = World("p1", record("d1", layout_fingerprint="other"), modes=["remote_prefill"])
    assert world.refuse() == (Role.DECODE, "layout")
