"""What is counted between two reports, and when it is expected in the batch: ledger, forecast, table."""

import random
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.ids import Epoch, WorkerId
from core.membership import Role, WorkerState
from router.prompt_hashes import HashKey
from router.routing.columns import FORECAST_BUCKETS
from router.routing.decision import Decision
from router.routing.modes import Binding, Mode
from router.routing.table import NO_CREDIT, Credit
from tests.routing_world import START, World, load_report, record

P, D = WorkerId("p1"), WorkerId("d1")
REMOTE: dict[str, Any] = {"modes": ["remote_prefill"], "submit_slack_s": 0.0}


def report(world: World, worker_id: WorkerId, sequence: int, **load: int) -> None:
    world.table.report(worker_id, load_report(sequence, **load), world.clock.at)
    world.credit.reported(worker_id)


def batch(world: World, name: str) -> float:
    """Requests that are expected in a worker's batch at some time, as far as this gateway sent them."""
    slot = world.slot(name)
    return float(world.table.rows[slot]["due_requests"] + world.table.forecast.joins[slot, :, 0].sum())


def test_credit_counts_from_the_sending_to_the_first_report_after_the_acceptance() -> None:
    world = World("p1", "d1", **REMOTE)
    decision = world.place()
    world.credit.place("r1", decision, START)
    assert world.credit.of(P) == Credit(1, 1000, 1000, decision.winner.compute_s)
    assert world.credit.of(D) == Credit(1, 0, 1000, 0.0)
    assert set(world.credit.workers()) == {P, D}
    report(world, P, 2)
    assert world.credit.of(P) != NO_CREDIT, "the report cannot include what was not accepted before it"
    world.credit.accepted(P, "r1")
    report(world, P, 3, queued_prefill_tokens=1000)
    assert world.credit.of(P) == NO_CREDIT
    assert list(world.credit.workers()) == [D]


def test_a_reservation_stays_in_the_forecast_until_the_report_that_has_it_in_the_batch() -> None:
    world = World("p1", "d1", **REMOTE)
    world.credit.place("r1", world.place(), START)
    assert batch(world, "d1") == 1
    world.credit.accepted(D, "r1")
    report(world, D, 2, num_waiting=1, num_reserved=1, reserved_tokens=1000)
    row = world.table.rows[world.slot("d1")]
    assert world.credit.of(D) == NO_CREDIT
    assert (batch(world, "d1"), row["own_reserved"], row["running"]) == (1, 1, 0), "counted once, by the forecast"
    world.credit.landed(D, "r1")
    assert batch(world, "d1") == 1
    report(world, D, 3, num_running=1)
    assert (batch(world, "d1"), row["own_reserved"], row["running"]) == (0, 0, 1), "counted once, by the report"
    world.credit.drop(D, "r1")
    world.table.check()


def test_a_prompt_that_is_computed_is_no_load_any_more() -> None:
    world = World("p1", "d1", **REMOTE)
    world.credit.place("r1", world.place(), START)
    world.credit.computed(P, "r1")
    world.credit.computed(D, "r1")
    assert world.credit.of(P) == NO_CREDIT
    assert world.credit.of(D) != NO_CREDIT, "it has the reservation"
    world.credit.drop(D, "r1")
    world.credit.drop(D, "r1")
    world.credit.accepted(D, "r1")
    assert world.credit.of(D) == NO_CREDIT


def test_another_prefill_worker_for_the_same_reservation_leaves_that_as_it_is() -> None:
    world = World("p1", "p2", "d1", **REMOTE)
    first = world.place()
    assert first.prefill is not None
    world.credit.place("r1", first, START)
    world.credit.accepted(D, "r1")
    world.credit.drop(first.prefill, "r1")
    second = world.place(world.query(reserved_decode=D, refused=frozenset({first.prefill})))
    world.credit.place("r1", second, START)
    assert world.credit.of(D).num_requests == 1
    report(world, D, 2)
    assert world.credit.of(D) == NO_CREDIT, "it had been accepted"
    assert second.prefill is not None
    assert world.credit.of(second.prefill).num_requests == 1


def test_late_binding_counts_the_prefill_first_and_the_decode_worker_when_it_is_chosen() -> None:
    world = World("p1", record("d1", load=load_report(free_blocks=2, num_running=30)))
    late = world.place()
    assert late.binding is Binding.LATE
    world.credit.place("r1", late, START)
    assert (world.credit.of(P).num_requests, world.credit.of(D)) == (1, NO_CREDIT)
    bound = world.place(world.query(bound_prefill=P, remaining_prefill_s=0.2))
    world.credit.place_decode("r1", bound, START)
    assert (world.credit.of(P).num_requests, world.credit.of(D).num_requests) == (1, 1)


def test_a_worker_that_does_it_all_has_the_whole_request() -> None:
    world = World("d1")
    decision = world.place()
    assert decision.mode is Mode.COLOCATED
    world.credit.place("r1", decision, START)
    assert world.credit.of(D) == Credit(1, 1000, 1000, decision.winner.compute_s)
    assert batch(world, "d1") == 1
    world.credit.accepted(D, "r1")
    report(world, D, 2, num_waiting=1)
    assert (world.credit.of(D), batch(world, "d1")) == (NO_CREDIT, 0)


def test_who_listens_is_told_of_every_change() -> None:
    world = World("p1", "d1", **REMOTE)
    told: list[WorkerId] = []
    world.credit.on_changed = told.append
    world.credit.place("r1", world.place(), START)
    assert told == [P, D]
    world.credit.drop(P, "r1")
    assert told == [P, D, P]


def test_without_credit_nothing_is_counted() -> None:
    world = World("p1", "d1", ignored_terms=["credit"], **REMOTE)
    world.credit.place("r1", world.place(), START)
    assert (world.credit.of(P), batch(world, "d1")) == (NO_CREDIT, 0)


def test_a_burst_without_reports_spreads() -> None:
    world = World(*[f"p{idx}" for idx in range(4)], *[f"d{idx}" for idx in range(4)], **REMOTE)
    sent: dict[WorkerId | None, int] = {}
    for idx in range(40):
        decision = world.place()
        world.credit.place(f"r{idx}", decision, START)
        for worker_id in (decision.prefill, decision.decode):
            sent[worker_id] = sent.get(worker_id, 0) + 1
    assert sorted(sent.values()) == [10] * 8


def test_a_request_is_expected_in_the_batch_when_its_prefill_ends() -> None:
    world = World("p1", "d1", "d2", **REMOTE)
    world.set("d1", decode_c0=0.0099)
    world.set("p1", queued_tokens=20_000, s_per_token=2e-4)  # four seconds
    decision = world.place()
    assert decision.decode == "d1"
    world.credit.place("r1", decision, START)
    world.set("p1", queued_tokens=0)
    assert world.place().decode == "d1", "what would be ready before that one does not meet it"
    world.clock.at += 5.0
    assert world.place().decode == "d2", "by now it should be there"
    blind = World("p1", "d1", "d2", ignored_terms=["forecast"], **REMOTE)
    blind.set("d1", decode_c0=0.0099)
    blind.set("p1", queued_tokens=20_000, s_per_token=2e-4)
    blind.credit.place("r1", blind.place(), START)
    blind.set("p1", queued_tokens=0)
    assert blind.place().decode == "d2", "counted at once"


def test_what_comes_later_than_the_ring_reaches_is_still_counted() -> None:
    world = World("p1", "d1", **REMOTE)
    forecast, rows, slot = world.table.forecast, world.table.rows, world.slot("d1")
    forecast.advance(rows, START)
    bucket = forecast.join(rows, slot, START + 10_000.0, 100)
    assert forecast.joins[slot, :, 0].sum() == 1
    forecast.advance(rows, START + 1.0)
    assert forecast.joins[slot, :, 0].sum() == 1
    forecast.advance(rows, START + 2 * FORECAST_BUCKETS)
    assert (rows[slot]["due_requests"], rows[slot]["due_tokens"], forecast.joins.sum()) == (1, 100, 0)
    forecast.leave(rows, slot, bucket, 100)
    assert (rows[slot]["due_requests"], rows[slot]["due_tokens"]) == (0, 0)


# --- the table ---


def test_an_incarnation_takes_all_that_was_known_of_it_along() -> None:
    world = World("p1", "d1", **REMOTE)
    world.credit.place("r1", world.place(), START)
    world.table.set_breaker(D, True)
    world.table.set_peer_credit(D, Epoch(1), Credit(3, 30, 300, 0.5))
    assert world.table.row(D) is not None
    world.models.observe_prefill(P, 1000, 0, 5.0)
    slow = float(world.table.rows[world.slot("p1")]["prefill_b"])
    for name in ("p1", "d1"):
        world.join(record(name, epoch=Epoch(2)))
        row = world.table.row(WorkerId(name))
        assert row is not None
        assert (row.credit, row.peer_credit, row.breaker_open, row.is_live) == (NO_CREDIT, NO_CREDIT, False, True)
    assert batch(world, "d1") == 0
    assert world.table.rows[world.slot("p1")]["prefill_b"] <= slow
    world.credit.drop(P, "r1")
    world.credit.drop(D, "r1")
    world.table.check()


def test_news_of_another_epoch_or_an_older_load_are_not_believed() -> None:
    world = World("p1")
    world.table.set_peer_credit(P, Epoch(9), Credit(1))
    world.table.report(P, load_report(5, queued_prefill_tokens=50), START)
    world.table.report(P, load_report(4, queued_prefill_tokens=40), START)
    world.table.report(WorkerId("nobody"), load_report(9), START)
    row = world.table.row(P)
    assert row is not None
    assert (row.peer_credit, row.load.queued_prefill_tokens) == (NO_CREDIT, 50)


def test_workers_that_left_are_gone_and_their_slots_are_used_again() -> None:
    world = World(*[f"p{idx}" for idx in range(40)])
    assert world.table.count_live() == {Role.PREFILL: 40, Role.DECODE: 0}
    slot = world.slot("p7")
    world.table.drop(WorkerId("p7"))
    world.table.drop(WorkerId("p7"))
    assert world.table.find(WorkerId("p7")) is None
    assert world.table.row(WorkerId("p7")) is None
    assert world.table.count_live()[Role.PREFILL] == 39
    world.join(record("d_new"))
    assert world.slot("d_new") == slot
    assert sum(world.table.count_live().values()) == 40
    world.table.check()


def test_only_a_ready_worker_with_a_stream_to_this_incarnation_is_live() -> None:
    world = World("p1")
    row = world.table.row
    assert row(P) is not None
    world.table.put(record("p1", state=WorkerState.DRAINING), START)
    assert world.table.count_live()[Role.PREFILL] == 0
    world.table.put(record("p1"), START)
    world.table.connected(P, Epoch(2))
    assert world.table.count_live()[Role.PREFILL] == 0
    world.table.connected(P, Epoch(1))
    assert world.table.count_live()[Role.PREFILL] == 1
    world.table.disconnected(P)
    assert world.table.count_live()[Role.PREFILL] == 0


def test_every_way_to_hash_that_is_in_use_has_a_code_of_its_own() -> None:
    world = World("p1", record("p2", block_size=32), record("p3", weights_version="next"))
    keys = [HashKey("weights", 16), HashKey("weights", 32), HashKey("next", 16)]
    assert world.table.hash_keys == {key: code for code, key in enumerate(keys)}
    assert [int(world.table.rows[world.slot(name)]["hash_key"]) for name in ("p1", "p2", "p3")] == [0, 1, 2]
    world.join(record("p2", block_size=32, state=WorkerState.DRAINING))
    world.table.drop(WorkerId("p2"))
    assert world.table.hash_keys == {keys[0]: 0, keys[2]: 2}, "no prompt is hashed for workers that are gone"
    world.join(record("p4", weights_version="newest"))
    assert world.table.hash_keys == {keys[0]: 0, keys[2]: 2, HashKey("newest", 16): 1}
    world.join(record("p1", weights_version="newest", epoch=Epoch(2)))
    assert world.table.hash_keys == {keys[2]: 2, HashKey("newest", 16): 1}
    assert int(world.table.rows[world.slot("p1")]["hash_key"]) == 1


class LedgerMachine(RuleBasedStateMachine):
    """Any order of news leaves counts that are nowhere negative, and nothing when every work has ended."""

    @initialize()
    def start(self) -> None:
        self.world = World("p1", "p2", "d1", "d2", late_binding=False)
        self.works: dict[str, Decision] = {}
        self.sequence = 1
        self.number = 0

    @rule(held=st.sampled_from([{}, {"d1": 900}]), steps=st.integers(1, 2000))
    def place(self, held: dict[str, int], steps: int) -> None:
        self.number += 1
        work_id = f"r{self.number}"
        decision = self.world.place(self.world.query(held=held, expected_output_tokens=steps))
        self.works[work_id] = decision
        self.world.credit.place(work_id, decision, self.world.clock.at, expected_output_tokens=steps)

    @rule(pick=st.randoms(use_true_random=False), kind=st.sampled_from(["accepted", "landed", "computed", "drop"]))
    def tell(self, pick: random.Random, kind: str) -> None:
        if self.works:
            work_id = pick.choice(sorted(self.works))
            worker_id = pick.choice([P, WorkerId("p2"), D, WorkerId("d2")])
            getattr(self.world.credit, kind)(worker_id, work_id)

    @rule(name=st.sampled_from(["p1", "p2", "d1", "d2"]))
    def report(self, name: str) -> None:
        self.sequence += 1
        report(self.world, WorkerId(name), self.sequence)

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds: float) -> None:
        self.world.clock.at += seconds
        self.world.table.forecast.advance(self.world.table.rows, self.world.clock.at)

    @rule(name=st.sampled_from(["p1", "d1"]), epoch=st.integers(1, 3))
    def restart(self, name: str, epoch: int) -> None:
        self.world.join(record(name, epoch=Epoch(epoch), load=load_report(self.sequence)))

    @invariant()
    def counts_hold(self) -> None:
        self.world.table.check()
        assert (self.world.table.rows["credit_prefill_s"] >= -1e-9).all()

    def teardown(self) -> None:
        for work_id in self.works:
            for name in ("p1", "p2", "d1", "d2"):
                self.world.credit.drop(WorkerId(name), work_id)
        for column in ("credit_requests", "credit_prefill_s", "own_reserved", "own_reserved_tokens", "due_requests"):
            assert not self.world.table.rows[column].any(), column
        assert not self.world.table.forecast.joins.any()
        assert not list(self.world.credit.workers())
        assert np.isfinite(self.world.table.rows["mean_steps"]).all()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
