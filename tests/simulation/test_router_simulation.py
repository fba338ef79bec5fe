"""The real router before simulated workers: nothing is lost, runs repeat, load and prefixes are used well."""

import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from core.service_class import ServiceClass, Slo
from router.admission.config import AdmissionConfig, ClassConfig, DoorMode
from router.routing.config import LinkPriors, PolicyName, RoutingConfig
from simulator import goodput
from simulator.answers import WorkerTerms
from simulator.arrivals import poisson
from simulator.cluster import Scenario, router_config, simulate
from simulator.comparison import MOONCAKE_TARGETS, steady
from simulator.machines import MACHINES
from simulator.outcomes import Run, SimulatedRequest
from simulator.traffic import ClassShare, block_hash, in_classes

_MACHINE = MACHINES["llama70b-a800x8"]
_LINKS = LinkPriors(same_rack_bytes_per_s=_MACHINE.link.bytes_per_s)


def _scenario(policy: PolicyName = "cost", **changes: object) -> Scenario:
    config = router_config(RoutingConfig(policy=policy, links=_LINKS))
    return replace(Scenario(config=config, machine=_MACHINE, num_prefill=4, num_decode=4), **changes)  # type: ignore[arg-type]


def _sessions(seed: int, *, rate_per_s: float, count: int, num_sessions: int = 40) -> list[SimulatedRequest]:
    """Conversations over a few long documents: a prompt extends the one before it of its session."""
    rng = random.Random(seed)
    lengths = [rng.randrange(4, 16) for _ in range(num_sessions)]
    made = []
    for number, arrival_s in enumerate(poisson(rate_per_s, count, rng)):
        session = rng.randrange(num_sessions)
        lengths[session] = 4 if lengths[session] > 40 else lengths[session] + rng.randrange(0, 3)
        hashes = tuple(block_hash(1000 * session * (depth > 0) + depth) for depth in range(lengths[session]))
        prompt_tokens = 512 * lengths[session] + rng.randrange(1, 512)
        made.append(SimulatedRequest(f"q{number}", arrival_s, prompt_tokens, rng.randrange(1, 300), hashes))
    return made


def _served(run: Run) -> bool:
    return all(outcome.is_served for outcome in run.outcomes)


def test_every_request_comes_to_one_end_and_all_is_given_back() -> None:
    traffic = _sessions(1, rate_per_s=6.0, count=300)
    run = simulate(_scenario(), traffic, seed=1)
    assert Counter(outcome.request.request_id for outcome in run.outcomes) == Counter(one.request_id for one in traffic)
    assert _served(run)
    for outcome in run.outcomes:
        assert outcome.num_tokens == outcome.request.output_tokens
        assert outcome.ttft_s is not None
        assert outcome.total_s is not None
        gaps_s = sum(gap_s * count for gap_s, count in outcome.gaps)
        assert outcome.total_s == pytest.approx(outcome.ttft_s + gaps_s, abs=0.01)  # but for the wires
        assert sum(count for _, count in outcome.gaps) == outcome.num_tokens - 1
        least_s = _MACHINE.prefill.prompt_s(outcome.request.prompt_tokens - outcome.cached_tokens, 0, 2048)
        assert outcome.ttft_s >= least_s


def test_equal_seeds_give_equal_runs() -> None:
    traffic = _sessions(2, rate_per_s=8.0, count=200)
    first, again = (simulate(_scenario(), traffic, seed=3) for _ in range(2))
    assert first == again
    assert simulate(_scenario(), traffic, seed=4) != first


def test_our_cost_beats_the_policies_that_see_less() -> None:
    ttft_s: dict[str, float] = {}
    hits: dict[str, float] = {}
    policies: tuple[PolicyName, ...] = ("random", "least_loaded", "cache_aware_local", "cost")
    for policy in policies:
        scenario = _scenario(policy, terms=WorkerTerms(max_queued_tokens=10**6))
        run = steady(simulate(scenario, _sessions(1, rate_per_s=7.0, count=300), seed=1))
        ttft_s[policy] = goodput.mean_ttft_s(run, miss_s=30.0)
        hits[policy] = goodput.hit_ratio(run)
    assert ttft_s["cost"] < 1.1 * ttft_s["cache_aware_local"], ttft_s  # ahead on average; one seed is a little noisy
    assert ttft_s["cost"] < 0.5 * ttft_s["least_loaded"], ttft_s
    assert ttft_s["random"] == max(ttft_s.values()), ttft_s
    assert hits["cost"] > 1.2 * hits["least_loaded"], hits


def test_asking_above_saturation_is_no_storm() -> None:
    """Workers refuse all the time; the questions per request stay few (P/D-Serve's storm is what the gate prevents)."""
    scenario = _scenario(
        config=router_config(RoutingConfig(links=_LINKS), request_timeout_s=15.0),
        terms=WorkerTerms(max_queued_tokens=8192),
    )
    run = simulate(scenario, _sessions(5, rate_per_s=25.0, count=400, num_sessions=400), seed=5)
    assert not _served(run)  # else it was no overload
    assert run.num_orders / len(run.outcomes) < 16  # twice round all workers
    good = goodput.attainment(run, partial(goodput.meets_pd_serve, targets=MOONCAKE_TARGETS))
    assert good > 0.2  # and the cluster goes on working


def test_three_gateways_serve_as_one_does_even_without_their_store() -> None:
    attained = []
    scenarios = (_scenario(), _scenario(num_gateways=3), _scenario(num_gateways=3, store_outage_s=(20.0, 60.0)))
    for scenario in scenarios:
        run = steady(simulate(scenario, _sessions(1, rate_per_s=4.0, count=400), seed=1))
        assert _served(run)
        targets = replace(MOONCAKE_TARGETS, ttft_s=8.0)
        attained.append(goodput.attainment(run, partial(goodput.meets_mooncake, targets=targets)))
    assert max(attained) - min(attained) <= 0.02, attained


def test_every_class_finishes_under_overload() -> None:
    """More than the cluster can do for a minute: who can wait does, and nobody for ever."""
    drawn = random.Random(7)
    classes = (
        ClassShare(ServiceClass.INTERACTIVE, 0.5),
        ClassShare(ServiceClass.DEADLINE, 0.25, Slo(deadline_s=60.0)),
        ClassShare(ServiceClass.BATCH, 0.25),
    )
    made = _sessions(6, rate_per_s=12.0, count=400, num_sessions=400)
    traffic = in_classes(made, classes, ("one", "two"), drawn)
    off = ClassConfig(door=DoorMode.OFF)
    admission = AdmissionConfig(interactive=off, deadline=off, batch=off, aging_s=5.0)
    config = router_config(RoutingConfig(links=_LINKS), admission=admission, request_timeout_s=3600.0)
    terms = WorkerTerms(max_queued_tokens=16_384)
    run = simulate(_scenario(config=config, terms=terms), traffic, seed=6)
    assert _served(run)
    waits = {
        wanted: sorted(one.ttft_s or 0.0 for one in run.outcomes if one.request.service_class is wanted)
        for wanted in ServiceClass
    }
    medians = {wanted: found[len(found) // 2] for wanted, found in waits.items()}
    assert medians[ServiceClass.INTERACTIVE] < medians[ServiceClass.DEADLINE] < medians[ServiceClass.BATCH]
