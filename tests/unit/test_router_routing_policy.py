"""The cost policy: a table of cases, filters, modes, binding, and properties of every term."""

import math
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerState
from core.service_class import Slo
from router.routing.decision import CostTerms, PickReason
from router.routing.modes import Binding, Mode, ModeReason
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


# --- filters ---


def test_who_is_missing_and_why() -> None:
    assert World().refuse() == (Role.PREFILL, "absent")
    assert World("p1", modes=["remote_prefill"]).refuse() == (Role.DECODE, "absent")
    world = World(*PAIRS, **REMOTE)
    everybody = frozenset(WorkerId(name) for name in PAIRS)
    assert world.refuse(world.query(refused=everybody)) == (Role.PREFILL, "refused")
    assert world.refuse(world.query(max_total_tokens=10**6)) == (Role.PREFILL, "too_long")
    world.table.disconnected(WorkerId("p1"))
    world.table.disconnected(WorkerId("p2"))
    assert world.refuse() == (Role.PREFILL, "not_live")


def test_a_worker_of_another_incarnation_or_that_drains_is_not_asked() -> None:
    world = World(*PAIRS, **REMOTE)
    world.table.connected(WorkerId("p1"), Epoch(7))
    world.table.put(record("d1", state=WorkerState.DRAINING), START)
    assert {(one.prefill, one.decode) for one in (world.place() for _ in range(20))} == {("p2", "d2")}


@pytest.mark.parametrize("column", [{"breaker_open": True}, {"heard_at": START - 60}])
def test_broken_and_silent_workers_are_asked_last_and_never_empty_a_pool(column: dict[str, float]) -> None:
    world = World(*PAIRS, **REMOTE)
    world.set("p1", **column)
    assert {world.place().prefill for _ in range(20)} == {"p2"}
    world.set("p2", **column)
    assert {world.place().prefill for _ in range(20)} == {"p1", "p2"}


def test_a_decode_worker_that_accepted_is_kept_whatever_it_became() -> None:
    world = World(*PAIRS, **REMOTE)
    world.table.disconnected(WorkerId("d1"))
    query = world.query(reserved_decode=WorkerId("d1"), refused=frozenset({WorkerId("p1")}))
    decision = world.place(query)
    assert (decision.prefill, decision.decode) == ("p2", "d1")
    assert decision.max_requests_held is None, "it accepted: nothing is asked of it again"


# --- modes ---


def test_a_decode_worker_that_holds_the_prefix_computes_the_short_rest() -> None:
    world = World(*PAIRS)
    decision = world.place(world.query(held={"d1": 960}))
    assert (decision.mode, decision.prefill, decision.decode) == (Mode.LOCAL_PREFILL, None, "d1")
    assert decision.mode_reason is ModeReason.PREFIX_AT_DECODE
    assert decision.terms.transfer_s == 0.0
    assert world.place().mode is Mode.REMOTE_PREFILL
    world.set("d1", running=40)
    world.set("p1", prefill_a=1e-3, prefill_b=1e-6)
    busy = world.place(world.query(held={"d1": 700}))
    assert busy.mode is Mode.REMOTE_PREFILL, "a prompt computed there would stop forty others"


@pytest.mark.parametrize(
    ("there", "alone", "reason"),
    [("p1", "prefill", ModeReason.NO_DECODE_POOL), ("d1", "decode", ModeReason.NO_PREFILL_POOL)],
)
def test_one_pool_serves_alone_while_the_other_is_missing(there: str, alone: str, reason: ModeReason) -> None:
    decision = World(there).place()
    assert decision.mode is Mode.COLOCATED
    assert decision.mode_reason is reason
    assert {"prefill": decision.prefill, "decode": decision.decode}[alone] == there
    assert decision.terms.handicap_s == 0.0


def test_one_worker_does_it_all_when_that_is_cheaper_by_more_than_the_handicap() -> None:
    world = World(*PAIRS)
    for name in ("d1", "d2"):
        world.set(name, decode_c0=0.2)
    decision = world.place()
    assert (decision.mode, decision.mode_reason) == (Mode.COLOCATED, ModeReason.CHEAPEST)
    assert decision.prefill in {"p1", "p2"}
    assert decision.terms.handicap_s > 0.0
    assert world.refuse(world.query(refused=frozenset(map(WorkerId, ("p1", "p2"))))) == (Role.PREFILL, "refused")


def test_a_request_of_one_token_needs_no_decode_worker() -> None:
    for names in (PAIRS, ("p1",)):
        world = World(*names, **REMOTE)
        decision = world.place(world.query(needs_decode=False, max_total_tokens=1001))
        assert decision.mode_reason is ModeReason.FIRST_TOKEN_IS_LAST
        assert decision.prefill in {"p1", "p2"}
        assert (decision.decode, decision.terms.decode_s, decision.max_requests_held) == (None, 0.0, None)


def test_where_only_one_worker_may_serve_a_request_any_of_both_pools_does() -> None:
    world = World(*PAIRS, modes=["colocated"], colocated_slowdown=1.0)
    decisions = [world.place() for _ in range(60)]
    assert {one.prefill or one.decode for one in decisions} == set(PAIRS)
    assert {(one.mode, one.mode_reason) for one in decisions} == {(Mode.COLOCATED, ModeReason.ONLY_POSSIBLE)}
    assert {one.terms.handicap_s for one in decisions} == {0.0}


def test_modes_that_are_not_allowed_leave_nobody() -> None:
    assert World(*PAIRS, modes=["local_prefill"]).refuse() == (Role.DECODE, "mode")


# --- late binding ---


def test_the_prefill_begins_while_no_decode_worker_has_room_but_one_will() -> None:
    full = [record(name, load=load_report(free_blocks=2, num_running=30)) for name in ("d1", "d2")]
    world = World("p1", "p2", *full)
    decision = world.place()
    assert decision.binding is Binding.LATE
    assert decision.prefill in {"p1", "p2"}
    assert decision.decode is None
    assert decision.winner.decode in {"d1", "d2"}
    one_has_room = World("p1", "p2", full[0], "d2", **REMOTE).place()
    assert (one_has_room.binding, one_has_room.decode) == (Binding.EARLY, "d2")
    assert World("p1", *full, late_binding=False, **REMOTE).place().binding is Binding.EARLY
    hopeless = World("p1", record("d1", load=FULL), late_patience_s=0.0, expected_output_tokens=10_000, **REMOTE)
    assert hopeless.place().binding is Binding.EARLY, "room comes too late: it waits in the queue, not on the device"


def test_the_prefill_begins_when_all_decode_workers_refused() -> None:
    world = World(*PAIRS)
    decision = world.place(world.query(refused=frozenset(map(WorkerId, ("d1", "d2")))))
    assert (decision.binding, decision.mode, decision.decode) == (Binding.LATE, Mode.REMOTE_PREFILL, None)
    never = World(*PAIRS, late_binding=False)
    assert never.refuse(never.query(refused=frozenset(map(WorkerId, ("d1", "d2"))))) == (Role.DECODE, "refused")


def test_a_bound_prefill_leaves_only_the_decode_worker_open() -> None:
    world = World(*PAIRS)
    world.set("d1", running=5)
    world.set("p1", queued_tokens=100_000)
    decision = world.place(world.query(bound_prefill=WorkerId("p1"), remaining_prefill_s=0.3))
    assert (decision.prefill, decision.decode, decision.binding) == ("p1", "d2", Binding.EARLY)
    assert decision.winner.ready_in_s == pytest.approx(0.3)
    assert decision.max_queued_tokens is None, "the prompt is under way"
    both = world.query(bound_prefill=WorkerId("p1"), refused=frozenset(map(WorkerId, ("d1", "d2"))))
    assert world.refuse(both) == (Role.DECODE, "refused")


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


def test_a_request_that_a_busy_worker_could_serve_alone_is_not_too_long() -> None:
    """What is too long ends the request; what is refused waits."""
    world = World(record("p1", max_model_len=500), "d1")
    assert world.place().decode == "d1"
    refused = replace(world.query(), refused=frozenset({WorkerId("d1")}))
    assert world.refuse(refused) == (Role.DECODE, "refused")
    paired = World(record("p1", max_model_len=500), "d1", **REMOTE)
    assert paired.refuse(replace(paired.query(), refused=frozenset({WorkerId("d1")}))) == (Role.PREFILL, "too_long")


def test_who_refused_is_not_asked_again_when_no_prefill_worker_could_begin() -> None:
    """Without one there is no late binding, which alone may count on those who refuse now."""
    everybody = frozenset(map(WorkerId, ("p1", "d1", "d2")))
    alone = World("d1", "d2")
    assert alone.refuse(replace(alone.query(), refused=everybody)) == (Role.DECODE, "refused")
    busy = World("p1", "d1", "d2")
    query = replace(busy.query(held={"d1": 900, "d2": 900}), refused=everybody)
    assert busy.refuse(query) == (Role.PREFILL, "refused")


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
