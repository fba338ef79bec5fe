"""From a request and its hashes to a decision that is remembered: prefixes by worker, the placer, the baselines."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from core.ids import RequestId, WorkerId
from core.kv_events import Tier
from core.request import GenerateRequest, SamplingParams
from router.explain.outcome import RouteOutcome
from router.index.prefix_index import PrefixIndex
from router.prompt_hashes import HashKey, PromptHashes
from router.routing.config import PolicyName
from router.routing.decision import Decision, NoCandidate, PickReason
from router.routing.held import held_prefixes
from router.routing.modes import Mode
from router.routing.placer import Placer
from tests.routing_world import World, load_report, record

REMOTE: dict[str, Any] = {"modes": ["remote_prefill"]}
CHAIN = tuple(bytes([number]) * 16 for number in range(64))
KEY, WIDE = HashKey("weights", 16), HashKey("weights", 32)


def request(num_tokens: int = 1024, max_tokens: int = 100, name: str = "r") -> GenerateRequest:
    return GenerateRequest(RequestId(name), (1,) * num_tokens, SamplingParams(max_tokens=max_tokens))


def test_prefixes_are_tokens_by_slot_and_tier() -> None:
    world = World("p1", "p2", "d1")
    index = PrefixIndex(2**20, world.table.slots)
    index.store(WorkerId("p1"), CHAIN[:10])
    index.store(WorkerId("p2"), CHAIN[:4])
    index.store(WorkerId("p2"), CHAIN[:30], Tier.HOST)
    held = held_prefixes(index, world.table, PromptHashes.known({KEY: CHAIN}))
    assert [held.device[world.slot(name)] for name in ("p1", "p2", "d1")] == [160, 64, 0]
    assert [held.host[world.slot(name)] for name in ("p1", "p2", "d1")] == [160, 480, 0]
    nothing = held_prefixes(index, world.table, PromptHashes.known({}))
    assert not nothing.device.any()


def test_every_worker_is_matched_by_its_own_way_to_hash() -> None:
    world = World("p1", record("p2", block_size=32))
    index = PrefixIndex(2**20, world.table.slots)
    wide = CHAIN[32:48]
    index.store(WorkerId("p1"), CHAIN[:8])
    index.store(WorkerId("p2"), wide[:8])
    held = held_prefixes(index, world.table, PromptHashes.known({KEY: CHAIN[:32], WIDE: wide}))
    assert [held.device[world.slot(name)] for name in ("p1", "p2")] == [128, 256]


def placer(world: World, index: PrefixIndex) -> Placer:
    links = world.models.links
    return Placer(world.config, world.clock, random.Random(0), world.table, links, index, staleness=lambda: 0.5)


def test_a_scored_prompt_is_computed_whole_and_sent_as_far_as_it_is_not_held() -> None:
    waits = load_report(queued_prefill_tokens=100)  # less than the prefix saves
    world = World("p1", record("p2", load=waits), "d1", "d2", **REMOTE)
    index = PrefixIndex(2**20, world.table.slots)
    for name in ("p2", "d2"):
        index.store(WorkerId(name), CHAIN[:32])
    hashes, plain = PromptHashes.known({KEY: CHAIN}), request()
    asked = replace(plain, sampling=replace(plain.sampling, prompt_logprobs=0))
    ours = placer(world, index)
    usual = ours.place(plain, hashes, expected_output_tokens=64)
    scored = ours.place(asked, hashes, expected_output_tokens=64)
    assert isinstance(usual, Decision)
    assert isinstance(scored, Decision)
    assert (usual.prefill, usual.winner.held_tokens, usual.winner.uncached_tokens) == ("p2", 512, 512)
    assert (scored.prefill, scored.winner.held_tokens, scored.winner.uncached_tokens) == ("p1", 0, 1024)
    assert (scored.decode, scored.winner.decode_held_tokens) == ("d2", 512)


def test_a_placement_is_remembered_with_what_it_rested_on() -> None:
    world = World("p1", "p2", "d1", **REMOTE)
    index = PrefixIndex(2**20, world.table.slots)
    index.store(WorkerId("p2"), CHAIN[:32])
    ours = placer(world, index)
    decision = ours.place(request(), PromptHashes.known({KEY: CHAIN}), expected_output_tokens=64)
    assert isinstance(decision, Decision)
    assert (decision.prefill, decision.winner.held_tokens, decision.winner.uncached_tokens) == ("p2", 512, 512)
    assert decision.staleness_s == 0.5
    assert decision.decision_s > 0.0
    kept = ours.explanations.of(RequestId("r"))
    assert [one.decision for one in kept] == [decision]
    assert (kept[0].num_prompt_tokens, kept[0].expected_output_tokens) == (1024, 64)
    assert ours.explanations.observed(RequestId("r"), RouteOutcome(1.0)) is kept[0]
    assert isinstance(
        ours.forecast(request(name="asked"), PromptHashes.known({KEY: CHAIN}), expected_output_tokens=64), Decision
    )
    assert ours.explanations.of(RequestId("asked")) == [], "nothing was sent by a forecast"


def test_a_late_decode_worker_and_another_prefill_worker() -> None:
    world = World("p1", "p2", "d1", "d2", **REMOTE)
    ours, hashes = placer(world, PrefixIndex(2**20, world.table.slots)), PromptHashes.known({})
    bound = ours.place_decode(
        request(), hashes, prefill=WorkerId("p1"), remaining_prefill_s=0.1, expected_output_tokens=64
    )
    assert isinstance(bound, Decision)
    assert bound.prefill == "p1"
    again = ours.place(
        request(),
        hashes,
        reserved_decode=WorkerId("d2"),
        refused=frozenset({WorkerId("p2")}),
        expected_output_tokens=64,
    )
    assert isinstance(again, Decision)
    assert (again.prefill, again.decode) == ("p1", "d2")
    world.table.drop(WorkerId("p1"))
    gone = ours.place_decode(
        request(), hashes, prefill=WorkerId("p1"), remaining_prefill_s=0.1, expected_output_tokens=64
    )
    assert isinstance(gone, NoCandidate), "never another prefill worker than the one that computes"
    assert len(ours.explanations) == 2


def test_a_request_of_one_token_is_not_decoded() -> None:
    world = World("p1", "d1", **REMOTE)
    ours = placer(world, PrefixIndex(2**20, world.table.slots))
    decision = ours.place(request(max_tokens=1), PromptHashes.known({}), expected_output_tokens=1)
    assert isinstance(decision, Decision)
    assert (decision.prefill, decision.decode) == ("p1", None)


# --- baselines ---

POOL = ("p1", "p2", "p3", "p4", "d1", "d2", "d3", "d4")


def picks(policy: PolicyName, rounds: int, held: dict[str, int] | None = None, **busy: int) -> Counter[str]:
    world = World(*POOL, policy=policy, **REMOTE)
    for name, requests in busy.items():
        world.set(name, requests=requests)
    decisions = [world.place(world.query(held=held)) for _ in range(rounds)]
    assert {one.reason for one in decisions} == {PickReason.BASELINE}
    assert {one.mode for one in decisions} == {Mode.REMOTE_PREFILL}
    assert {one.max_queued_tokens for one in decisions} == {None}
    return Counter(str(name) for one in decisions for name in (one.prefill, one.decode))


def test_random_asks_anybody() -> None:
    found = picks("random", 800)
    assert set(found) == set(POOL)
    assert all(120 < count < 290 for count in found.values())


def test_round_robin_asks_each_in_turn() -> None:
    assert set(picks("round_robin", 40).values()) == {10}


def test_least_loaded_counts_requests() -> None:
    assert picks("least_loaded", 10, p1=1, p2=2, p4=3, d1=5, d2=1, d3=1) == {"p3": 10, "d4": 10}


@pytest.mark.parametrize(
    ("held", "busy", "expected"),
    [
        ({"p2": 900, "p3": 400}, {}, "p2"),
        ({"p2": 900, "p3": 400}, {"p2": 20, "p1": 1, "p4": 1}, "p3"),  # uneven: the fewest requests
        ({"p2": 100}, {"p1": 1, "p2": 1, "p4": 1}, "p3"),  # not worth following
    ],
)
def test_cache_aware_follows_the_prefix_while_the_pool_is_even(
    held: dict[str, int], busy: dict[str, int], expected: str
) -> None:
    assert picks("cache_aware_local", 10, held, **busy)[expected] == 10


@pytest.mark.parametrize("policy", ["cost", "random", "round_robin", "least_loaded", "cache_aware_local"])
def test_a_worker_that_is_fixed_and_gone_is_not_replaced_by_another(policy: PolicyName) -> None:
    world = World("p1", "d1", "d2", policy=policy, **REMOTE)
    query = world.query()
    for gone in (replace(query, reserved_decode=WorkerId("d3")), replace(query, bound_prefill=WorkerId("p3"))):
        assert world.refuse(gone)[1] == "absent"


@pytest.mark.parametrize("policy", ["random", "round_robin", "least_loaded", "cache_aware_local"])
def test_baselines_keep_to_the_filters_and_serve_alone_when_a_pool_is_missing(policy: PolicyName) -> None:
    world = World("p1", "p2", "d1", policy=policy)
    refused = frozenset({WorkerId("p1")})
    assert {world.place(world.query(refused=refused)).prefill for _ in range(10)} == {"p2"}
    world.table.drop(WorkerId("d1"))
    alone = world.place()
    assert (alone.mode, alone.decode) == (Mode.COLOCATED, None)
    world.table.disconnected(WorkerId("p1"))
    world.table.disconnected(WorkerId("p2"))
    assert world.refuse()[1] == "not_live"
    only_decode = World(record("d1", load=load_report(num_running=3)), policy=policy)
    assert only_decode.place().decode == "d1"
