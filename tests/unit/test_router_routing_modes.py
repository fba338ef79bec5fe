"""Who may be asked and in which mode: filters, pools that are missing, late binding."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerState
from core.service_class import Slo
from router.routing.config import PolicyName
from router.routing.decision import CostTerms, NoCandidate
from router.routing.modes import Binding, Mode, ModeReason
from router.routing.query import Session
from tests.routing_world import START, World, load_report, record

REMOTE: dict[str, Any] = {"modes": ["remote_prefill"]}
PAIRS = ("p1", "p2", "d1", "d2")
FULL = load_report(free_blocks=0)


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


# --- whatever the cluster and the request ---

LOADS = st.builds(
    LoadReport,
    sequence=st.just(1),
    num_running=st.sampled_from([0, 1, 500]),
    num_waiting=st.sampled_from([3, 500]),
    num_reserved=st.sampled_from([0, 3]),
    queued_prefill_tokens=st.sampled_from([0, 1, 10**9]),
    context_tokens=st.sampled_from([0, 10**8]),
    free_blocks=st.sampled_from([0, 1, 4000]),
    total_blocks=st.sampled_from([0, 4000]),
)
FACTS = st.fixed_dictionaries(
    {
        "load": LOADS,
        "block_size": st.sampled_from([0, 1, 512]),
        "weights_version": st.sampled_from(["", "old", "new"]),
        "layout_fingerprint": st.sampled_from(["old", "new"]),
        "kv_bytes_per_token": st.sampled_from([0, 100_000]),
        "max_model_len": st.sampled_from([0, 1000, 10**8]),
    }
)
MODES = st.sampled_from([*([mode] for mode in Mode), ["remote_prefill", "colocated"], list(Mode)])
POLICIES: tuple[PolicyName, ...] = ("cost", "cost", "random", "round_robin", "least_loaded", "cache_aware_local")


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_nobody_is_asked_who_refused_or_cannot_answer(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(["p1", "p2", "p3", "d1", "d2", "d3"]), unique=True))
    some = st.sets(st.sampled_from(names)) if names else st.just(set())
    world = World(
        *(record(name, **data.draw(FACTS)) for name in names),
        modes=data.draw(MODES),
        policy=data.draw(st.sampled_from(POLICIES)),
        temperature=data.draw(st.sampled_from([0.0, 0.5])),
        late_binding=data.draw(st.booleans()),
    )
    gone, refused = data.draw(some), frozenset(map(WorkerId, data.draw(some)))
    for name in gone:
        world.table.disconnected(WorkerId(name))
    num_tokens, max_tokens = data.draw(st.sampled_from([1, 1000, 10**7])), data.draw(st.sampled_from([1, 2, 10**6]))
    query = replace(
        world.query(
            held=dict.fromkeys(data.draw(some), num_tokens),
            hot=data.draw(st.sampled_from([(0, 0.0), (10**7, 1e6)])),
        ),
        num_prompt_tokens=num_tokens,
        max_total_tokens=num_tokens + max_tokens,
        needs_decode=max_tokens > 1,
        slo=data.draw(st.sampled_from([Slo(), Slo(1e-3, 1e-3, 1e-3)])),
        refused=refused,
        session=Session(WorkerId("p1"), WorkerId("d9")),
    )
    outcome = world.ask(query)
    if isinstance(outcome, NoCandidate):
        return
    assert not {outcome.prefill, outcome.decode} & {*gone, *refused}
    assert (outcome.prefill is not None and outcome.winner.decode is not None) == (outcome.mode is Mode.REMOTE_PREFILL)
    assert max_tokens > 1 or outcome.mode is not Mode.REMOTE_PREFILL
    for bound in (outcome.max_queued_tokens, outcome.max_requests_held):
        assert bound is None or 0 <= bound < 2**63
    for one in outcome.candidates():
        for field in fields(CostTerms):
            assert 0.0 <= getattr(one.terms, field.name) < math.inf, field.name
        assert 0.0 < one.ttft_s < math.inf
        assert 1 <= one.uncached_tokens <= num_tokens
