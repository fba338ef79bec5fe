"""The cost policy: a table of cases, filters, modes, binding, and properties of every term."""

import math
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import WorkerId
from core.service_class import Slo
from router.routing.decision import CostTerms, PickReason
from router.routing.policy import softmax
from router.routing.query import Session
from tests.routing_world import START, World, load_report, record

REMOTE: dict[str, Any] = {"modes": ["remote_prefill"]}
PAIRS = ("p1", "p2", "d1", "d2")
FULL = load_report(free_blocks=0)

# What makes the other one win: (columns of p1, columns of d1, fields of the query, expected pair)
CASES: dict[str, tuple[dict[str, float], dict[str, float], dict[str, Any], tuple[str, str] | None]] = {
    "longer-queue": ({"queued_tokens": 900}, {"running": 1}, {}, ("p2", "d2")),
    "credit-counts-as-queue": ({"credit_prefill_s": 0.5}, {"due_requests": 2}, {}, ("p2", "d2")),
    "credit-of-others-counts": ({"peer_prefill_s": 0.5}, {"peer_requests": 2}, {}, ("p2", "d2")),
    "slower-machine": ({"prefill_b": 1e-3}, {"decode_c0": 0.1}, {}, ("p2", "d2")),
    "longer-contexts": ({"prefill_c": 1e-6}, {"context_tokens": 90_000}, {}, ("p2", "d2")),
    "reserved-by-others": ({"prefill_a": 0.1}, {"reserved": 5, "own_reserved": 1}, {}, ("p2", "d2")),
    "no-blocks": ({"queued_tokens": 1}, {"free_blocks": 10}, {}, ("p2", "d2")),
    "held-prefix": ({}, {"running": 1}, {"held": {"p1": 640}}, ("p1", "d2")),
    "held-prefix-behind-a-longer-queue": ({"queued_tokens": 900}, {"running": 1}, {"held": {"p1": 640}}, ("p2", "d2")),
    "held-at-the-decode-worker": ({"queued_tokens": 1}, {}, {"held": {"d1": 640}}, ("p2", "d1")),
    "session": ({}, {}, {"session": Session(WorkerId("p1"), WorkerId("d2"))}, ("p1", "d2")),
    "refused": ({}, {}, {"refused": frozenset({WorkerId("p1"), WorkerId("d2")})}, ("p2", "d1")),
    "drained-since-the-report": ({"queued_tokens": 900, "reported_at": START - 60}, {"running": 1}, {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    prefill, decode, query, expected = CASES[name]
    world = World(*PAIRS, **REMOTE)
    world.set("p1", **prefill)
    world.set("d1", **decode)
    pairs = {(one.prefill, one.decode) for one in (world.place(world.query(**query)) for _ in range(30))}
    if expected is None:
        assert pairs == {("p1", "d2"), ("p2", "d2")}
    else:
        assert pairs == {expected}


def test_the_reason_tells_why_the_winner_won() -> None:
    assert World("p1", "d1", **REMOTE).place().reason is PickReason.ONLY
    world = World(*PAIRS, **REMOTE)
    assert world.place().reason is PickReason.TIE
    world.set("p1", queued_tokens=100)
    world.set("d1", running=3)
    assert world.place().reason is PickReason.CHEAPEST
    assert world.place(world.query(held={"p2": 640})).reason is PickReason.PREFIX


# --- terms ---

LOADS = {
    "p1": ("queued_tokens", "credit_prefill_s", "peer_prefill_s", "prefill_a", "prefill_b", "prefill_c"),
    "d1": (
        "running", "context_tokens", "reserved", "reserved_tokens", "due_requests", "due_tokens", "peer_requests",
        "peer_context_tokens", "credit_context_tokens", "decode_c0", "decode_c1", "decode_c2", "kv_bytes_per_token",
    ),
}  # fmt: skip
STEP = {"prefill_a": 0.1, "prefill_b": 1e-4, "prefill_c": 1e-7, "decode_c0": 0.01, "decode_c1": 1e-3, "decode_c2": 1e-6}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_terms_are_finite_and_not_negative_and_no_load_makes_a_placement_cheaper(data: st.DataObject) -> None:
    some = st.none() | st.floats(0.001, 1.0)
    columns = {
        name: {column: data.draw(st.floats(0.0, 1e-2 if column in STEP else 5000.0)) for column in LOADS[name]}
        for name in LOADS
    }
    for column in ("decode_c0", "decode_c1", "decode_c2"):
        columns["d1"][column] += 1e-7
    query: dict[str, Any] = {
        "held": {"p1": data.draw(st.integers(0, 1500)), "d1": data.draw(st.integers(0, 1500))},
        "in_host": {"p1": data.draw(st.integers(0, 1500))},
        "hot": (data.draw(st.integers(0, 1500)), data.draw(st.floats(0.0, 100.0))),
        "slo": Slo(data.draw(some), data.draw(some), data.draw(some)),
        "expected_output_tokens": data.draw(st.integers(1, 1000)),
    }
    name = data.draw(st.sampled_from(sorted(LOADS)))
    column = data.draw(st.sampled_from(LOADS[name]))
    more = data.draw(st.floats(1.0, 100.0)) * STEP.get(column, 50.0)

    def total(extra: float) -> tuple[float, CostTerms]:
        world = World("p1", "d1", late_binding=False, **REMOTE)
        for worker, values in columns.items():
            world.set(worker, **values)
        world.set(name, **{column: columns[name][column] + extra})
        terms = world.place(world.query(**query)).terms
        return terms.total_s, terms

    before, terms = total(0.0)
    for field in fields(CostTerms):
        value = getattr(terms, field.name)
        assert math.isfinite(value), field.name
        assert value >= 0.0, field.name
    forecast_s = 0.0
    if column in {"prefill_a", "prefill_b", "prefill_c", "queued_tokens", "credit_prefill_s", "peer_prefill_s"}:
        # A later end of the prefill finds fewer of those that run now: what may be gained there is bounded by them.
        forecast_s = terms.decode_s
    assert total(more)[0] >= before - forecast_s - 1e-7


def test_the_queue_term_is_in_seconds_and_falls_by_a_second_per_second() -> None:
    world = World("p1", "d1", **REMOTE)
    world.set("p1", queued_tokens=10_000, s_per_token=1e-3)
    assert world.place().terms.queue_s == pytest.approx(10.0)
    world.clock.at += 4.0
    assert world.place().terms.queue_s == pytest.approx(6.0)
    world.clock.at += 40.0
    assert world.place().terms.queue_s == 0.0


def test_half_a_token_rate_is_not_rounded_away() -> None:
    """Integer division in a score is a fault that peers had."""
    world = World("p1", "d1", **REMOTE)
    world.set("p1", queued_tokens=1, s_per_token=3e-7)
    assert world.place().terms.queue_s == pytest.approx(3e-7)


def test_the_prefill_hides_the_transfer_but_for_its_tail() -> None:
    world = World("p1", record("d1", kv_bytes_per_token=1_000_000), **REMOTE)
    world.set("p1", prefill_a=10.0)
    links = world.config.links
    wire_s = 1000 * 1e6 / links.same_host_bytes_per_s
    hidden = world.place()
    assert hidden.terms.transfer_s == pytest.approx(links.same_host_rtt_s + links.tail_ratio * wire_s)
    assert hidden.winner.transfer_total_s == pytest.approx(links.same_host_rtt_s + wire_s)
    world.set("p1", prefill_a=1e-3, prefill_b=1e-9, prefill_c=0.0)
    assert world.place().terms.transfer_s == pytest.approx(links.same_host_rtt_s + wire_s, rel=0.01)


def test_far_links_cost_more() -> None:
    near = record("d1", host="h1", rack="r1", zone="z1", kv_bytes_per_token=10**6)
    totals = []
    for place in ({"host": "h1"}, {"rack": "r1"}, {"zone": "z1"}, {}):
        world = World(record("p1", **{"host": "h9", **place}), near, **REMOTE)
        totals.append(world.place().terms.transfer_s)
    assert totals == sorted(totals)
    assert len(set(totals)) == 4


def test_what_is_in_the_host_tier_is_loaded_only_where_that_is_quicker() -> None:
    world = World("p1", "d1", **REMOTE)
    loaded = world.place(world.query(in_host={"p1": 900}))
    assert loaded.terms.host_tier_s == pytest.approx(900 * 10_000 / world.config.host_tier_bytes_per_s)
    assert (loaded.winner.held_tokens, loaded.winner.uncached_tokens) == (900, 100)
    slow = World("p1", "d1", host_tier_bytes_per_s=1000.0, **REMOTE)
    computed = slow.place(slow.query(in_host={"p1": 900}))
    assert (computed.terms.host_tier_s, computed.winner.held_tokens) == (0.0, 0)


def test_in_a_crowd_a_prefix_is_worth_more_than_a_short_queue() -> None:
    """What is computed twice is waited for by all who come behind it."""
    world = World("p1", "p2", "d1", **REMOTE)
    world.set("p1", queued_tokens=2000)
    query = world.query(held={"p1": 900})
    assert world.place(query).prefill == "p2", "0.4 s of queue against 0.18 s of computing"
    assert world.place(query).terms.crowding_s == 0.0
    for name in ("p1", "p2"):
        world.set(name, prompts=1, credit_requests=1)
    decision = world.place(query)
    assert decision.prefill == "p1"
    assert decision.terms.crowding_s == pytest.approx(world.config.crowding_weight * 2 * decision.terms.prefill_s)
    assert decision.ttft_s == decision.terms.queue_s + decision.terms.prefill_s, "a price, not a prediction"
    without = World("p1", "p2", "d1", ignored_terms=["crowding"], **REMOTE)
    for name in ("p1", "p2"):
        without.set(name, prompts=1, credit_requests=1)
    without.set("p1", queued_tokens=2000)
    assert without.place(without.query(held={"p1": 900})).prefill == "p2"


@pytest.mark.parametrize(
    ("load", "num_prompts"),
    [
        ({"num_running": 16, "context_tokens": 16_000}, 0),
        ({"num_running": 16, "num_waiting": 3, "queued_prefill_tokens": 4000}, 4),
        ({"num_running": 1, "queued_prefill_tokens": 1}, 1),
        ({"num_waiting": 2, "queued_prefill_tokens": 2000}, 2),
    ],
)
def test_who_only_decodes_is_no_crowd(load: dict[str, int], num_prompts: int) -> None:
    """Prefill workers that generate, too: nobody who does that waits for a prompt to be computed."""
    world = World("p1", "p2")
    for name in ("p1", "p2"):
        world.table.report(WorkerId(name), load_report(2, **load), world.clock.at)
    terms = world.place().terms
    assert terms.crowding_s == pytest.approx(world.config.crowding_weight * num_prompts * terms.prefill_s)


def test_the_first_who_runs_makes_no_batch_smaller() -> None:
    """The count and the tokens of a batch may come from news of different moments."""
    world = World("p1", "d1", **REMOTE)
    world.set("d1", context_tokens=50_000, due_tokens=50_000)
    idle_s = world.place().tpot_s
    world.set("d1", running=1)
    assert world.place().tpot_s > idle_s


def test_those_who_leave_a_batch_are_replaced() -> None:
    """A far horizon does not make a busy worker look idle: nobody knows yet who will come, but somebody will."""
    world = World("p1", "d1", **REMOTE)
    world.set("d1", running=20, context_tokens=20_000)
    soon = world.place().tpot_s
    world.set("p1", queued_tokens=1_000_000)
    assert world.place().tpot_s == pytest.approx(soon)
    world.set("d1", due_requests=30, due_tokens=30_000)
    late = world.place().tpot_s
    world.set("p1", queued_tokens=0)
    assert soon < late < world.place().tpot_s, "by then some of both will have left"


def test_a_prompt_on_a_decode_worker_slows_those_who_run_there_against_their_targets() -> None:
    world = World("d1", "d2")
    world.set("d1", running=10)
    query = world.query(slo=Slo(tpot_s=0.017))
    decision = world.place(query)
    assert (decision.decode, decision.terms.slo_s) == ("d2", 0.0)
    world.set("d2", running=10)
    crowded = world.place(query)
    assert crowded.tpot_s == pytest.approx(0.0157 + crowded.winner.compute_s / 64, rel=0.02)
    assert crowded.terms.slo_s > 0.0
    assert world.place(replace(query, needs_decode=False)).tpot_s == 0.0


def test_targets_that_will_be_missed_cost_by_how_much() -> None:
    world = World("p1", "d1", **REMOTE)
    plain = world.place()
    missed = world.place(world.query(slo=Slo(ttft_s=plain.ttft_s - 0.1)))
    assert missed.terms.slo_s == pytest.approx(0.1 * world.config.slo_weight)
    assert world.place(world.query(slo=Slo(ttft_s=plain.ttft_s + 0.1, tpot_s=1.0, deadline_s=100.0))).terms.slo_s == 0.0
    waited = world.place(world.query(slo=Slo(ttft_s=plain.ttft_s + 0.1), waited_s=0.3))
    assert waited.terms.slo_s == pytest.approx(0.2 * world.config.slo_weight)
    assert waited.ttft_s == pytest.approx(plain.ttft_s + 0.3)


def test_under_a_tpot_target_a_request_goes_where_it_is_kept() -> None:
    """d1 wins by the prefix that it holds until its batch would break the target."""
    world = World("p1", "d1", record("d2"), **REMOTE)
    world.set("d1", decode_c0=0.0105, kv_bytes_per_token=10**6)
    world.set("d2", decode_c0=0.0100, kv_bytes_per_token=10**6)
    query = world.query(held={"d1": 999}, expected_output_tokens=64)
    assert world.place(query).decode == "d1"
    limit = world.place(query).tpot_s - 4e-4
    assert world.place(replace(query, slo=Slo(tpot_s=limit))).decode == "d2"


def test_ignored_terms_count_nothing_and_predictions_stay() -> None:
    world = World("p1", "d1", ignored_terms=["queue", "prefill", "transfer", "decode"], **REMOTE)
    world.set("p1", queued_tokens=5000)
    decision = world.place()
    assert decision.terms.total_s == 0.0
    assert decision.ttft_s > 0.5
    assert decision.tpot_s > 0.0


# --- the draw ---


def test_temperature_draws_cheaper_ones_more_often() -> None:
    world = World("p1", "p2", "p3", "d1", temperature=0.5, **REMOTE)
    for idx, name in enumerate(("p1", "p2", "p3")):
        world.set(name, queued_tokens=1000 * idx)
    wins = Counter(str(world.place().prefill) for _ in range(600))
    assert wins["p1"] > wins["p2"] > wins["p3"] > 0
    drawn = next(one for one in iter(world.place, None) if one.prefill == "p3")
    assert (drawn.reason, drawn.max_queued_tokens) == (PickReason.SAMPLED, None)


def test_softmax_weighs_by_the_range_of_the_costs() -> None:
    assert softmax([1.0, 1.0], 0.5) == [1.0, 1.0]
    assert softmax([1.0, 3.0], 1.0) == pytest.approx(softmax([100.0, 300.0], 1.0))
    assert softmax([1.0, 3.0], 1.0) == pytest.approx([1.0, math.exp(-1.0)])


# --- conditional submission ---


def test_the_bound_is_what_is_known_to_wait_and_the_lead_over_the_next_best() -> None:
    world = World("p1", "p2", "d1", "d2", submit_slack_s=0.0, **REMOTE)
    world.set("p1", queued_tokens=500, s_per_token=1e-3)
    world.set("p2", queued_tokens=1500, s_per_token=1e-3, credit_prefill_tokens=7)
    world.set("d1", requests=3, running=3)
    world.set("d2", requests=9, running=9)
    decision = world.place()
    assert (decision.prefill, decision.decode) == ("p1", "d1")
    assert decision.prefill_slack_s == pytest.approx(1.0)
    assert decision.max_queued_tokens == pytest.approx(1500, abs=1)
    assert decision.decode_slack_s > 0.0
    assert decision.max_requests_held in range(4, 10)
    only = World("p1", "d1", **REMOTE).place()
    assert (only.max_queued_tokens, only.max_requests_held) == (None, None), "there is nobody else"


@pytest.mark.parametrize("mode", ["remote_prefill", "colocated"])
def test_the_wait_for_blocks_is_told_apart(mode: str) -> None:
    """The door adds it to what a request takes to its last token."""
    worker = "d1" if mode == "remote_prefill" else "p1"
    world = World("p1", "d1", modes=[mode], late_binding=False)
    if mode == "colocated":
        world.table.disconnected(WorkerId("d1"))
    query = replace(world.query(), expected_output_tokens=10)
    assert world.place(query).winner.room_s == 0.0
    world.set(worker, free_blocks=0)
    winner = world.place(query).winner
    assert winner.room_s > 0.0
    assert winner.terms.decode_s == pytest.approx(winner.room_s + 10 * winner.tpot_s)
