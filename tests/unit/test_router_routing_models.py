"""What is learned of machines and links: coefficients from noise, never negative, shared, forgotten."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import Epoch, WorkerId
from router.routing.fit import solve_non_negative
from router.routing.models import DECODE_COEFFICIENTS, PREFILL_COEFFICIENTS, LinearFit
from router.routing.topology import floor_class
from tests.routing_world import World, load_report, record

P, D = WorkerId("p1"), WorkerId("d1")
REMOTE: dict[str, Any] = {"modes": ["remote_prefill"]}
TRUE_PREFILL = np.array([0.018, 1.0e-4, 7.1e-9])
TRUE_DECODE = np.array([0.020, 4e-5, 6.3e-7])


def coefficients(world: World, name: str, names: tuple[str, str, str]) -> np.ndarray:
    row = world.table.rows[world.slot(name)]
    return np.array([row[one] for one in names])


def prefill_seconds(u: float, h: float, beta: np.ndarray = TRUE_PREFILL) -> float:
    return float(beta @ (1.0, u, u * (h + u / 2)))


def test_prefill_coefficients_are_recovered_from_noise() -> None:
    world, rng = World("p1", "p2", "d1"), np.random.default_rng(1)
    for _ in range(400):
        n = int(rng.integers(64, 32_000))
        held = int(rng.integers(0, n)) if rng.random() < 0.5 else 0
        world.models.observe_prefill(P, n, held, prefill_seconds(n - held, held) * rng.lognormal(0.0, 0.05))
    found = coefficients(world, "p1", PREFILL_COEFFICIENTS)
    assert found == pytest.approx(TRUE_PREFILL, rel=0.15)
    for u, h in ((200, 0), (4000, 0), (500, 20_000), (30_000, 0)):
        assert prefill_seconds(u, h, found) == pytest.approx(prefill_seconds(u, h), rel=0.08)
    assert coefficients(world, "p2", PREFILL_COEFFICIENTS) == pytest.approx(TRUE_PREFILL, rel=0.15), "as its fellow"


def test_decode_coefficients_are_recovered_from_reports_of_busy_workers() -> None:
    world, rng = World("p1", "d1", "d2"), np.random.default_rng(2)
    world.models.observe_load(D, load_report(num_running=0, decode_step_s=9.0))
    assert coefficients(world, "d1", DECODE_COEFFICIENTS) == pytest.approx([0.01, 5e-4, 2e-7])
    for _ in range(400):
        requests, tokens = int(rng.integers(1, 120)), int(rng.integers(100, 100_000))
        step_s = float(TRUE_DECODE @ (1.0, requests, tokens)) * rng.lognormal(0.0, 0.05)
        world.models.observe_load(D, load_report(num_running=requests, context_tokens=tokens, decode_step_s=step_s))
    found = coefficients(world, "d1", DECODE_COEFFICIENTS)
    for requests, tokens in ((1, 1000), (100, 100_000), (50, 5000)):
        x = (1.0, requests, tokens)
        assert found @ x == pytest.approx(TRUE_DECODE @ x, rel=0.06)
    assert coefficients(world, "d2", DECODE_COEFFICIENTS) == pytest.approx(found, rel=0.3)


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, 0.0, -1.0])
def test_what_is_no_time_teaches_nothing(nonsense: float) -> None:
    """One such number would stay in the fit of the whole pool for ever."""
    world = World("p1", "p2", "d1", **REMOTE)
    before = world.place().winner
    world.models.observe_prefill(P, 1000, 0, nonsense)
    world.models.observe_load(P, load_report(2).model_copy(update={"prefill_tokens_per_s": nonsense}))
    world.models.observe_load(D, load_report(2, num_running=1).model_copy(update={"decode_step_s": nonsense}))
    world.models.observe_link(P, D, nonsense, None if nonsense == 0.0 else nonsense)
    world.models.observe_transfer(
        P, D, quality_floor=1.0, kv_bytes=10**6, wire_bytes=10**6, exposed_s=0.01, predicted_s=0.01
    )
    for name in ("prefill_s", "transfer_s", "decode_s"):
        assert getattr(world.place().terms, name) == pytest.approx(getattr(before.terms, name))


def test_a_machine_that_changed_is_learned_anew() -> None:
    world, rng = World("p1"), np.random.default_rng(3)
    for slower in (1.0, 4.0):
        for _ in range(400):
            n = int(rng.integers(64, 8000))
            world.models.observe_prefill(P, n, 0, slower * prefill_seconds(n, 0))
        found = coefficients(world, "p1", PREFILL_COEFFICIENTS)
        assert prefill_seconds(4000, 0, found) == pytest.approx(slower * prefill_seconds(4000, 0), rel=0.1)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.floats(1.0, 1e5), st.floats(0.0, 1e5), st.floats(1e-6, 1e3)),
        min_size=1,
        max_size=40,
    )
)
def test_coefficients_never_become_negative(seen: list[tuple[float, float, float]]) -> None:
    fit = LinearFit((0.01, 2e-4, 2e-9), 4.0, 64.0)
    for u, h, seconds in seen:
        beta = fit.observe(0, 1, (1.0, u, u * (h + u / 2)), seconds)
        assert (beta >= 0.0).all()
        assert np.isfinite(beta).all()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_the_solution_is_the_best_of_all_that_are_not_negative(seed: int) -> None:
    """Against a fine search around it: the objective is convex, so a local minimum is the minimum."""
    rng = np.random.default_rng(seed)
    features = rng.random((6, 3)) * rng.choice([1.0, 1e3], 3)
    gram, moment = features.T @ features + 1e-6 * np.eye(3), features.T @ rng.normal(1.0, 2.0, 6)
    found = np.empty(3)
    solve_non_negative(gram, moment, found)
    gradient = gram @ found - moment
    scale = np.sqrt(np.diag(gram)) * (1.0 + np.abs(moment / np.sqrt(np.diag(gram))).max())
    assert (found >= 0.0).all()
    assert (gradient / scale >= -1e-6).all(), "more of nothing would be better"
    assert np.abs(np.where(found > 0.0, gradient / scale, 0.0)).max() <= 1e-6


def test_until_a_prompt_was_seen_the_workers_own_rate_counts() -> None:
    world = World("p1", "p2", "d1", **REMOTE)
    world.models.observe_load(P, load_report(prefill_tokens_per_s=50_000.0))
    world.set("p1", queued_tokens=5000)
    decision = world.place()
    assert decision.prefill == "p1", "ten times as fast as the prior says of p2"
    assert decision.terms.queue_s == pytest.approx(0.1)
    world.models.observe_prefill(P, 1000, 0, 3.0)
    world.models.observe_load(P, load_report(prefill_tokens_per_s=50_000.0))
    assert float(world.table.rows[world.slot("p1")]["s_per_token"]) > 1e-4, "seen is better than told"


def test_who_was_slow_once_is_taken_for_an_average_one_again() -> None:
    world = World("p1", "p2")
    slow, fast = coefficients(world, "p1", PREFILL_COEFFICIENTS), np.empty(0)
    for _ in range(50):
        world.models.observe_prefill(P, 1000, 0, 10.0)
    slow = coefficients(world, "p1", PREFILL_COEFFICIENTS)
    world.clock.at += 61.0
    for _ in range(200):
        world.models.observe_prefill(WorkerId("p2"), 1000, 0, 0.1)
    fast = coefficients(world, "p1", PREFILL_COEFFICIENTS)
    assert prefill_seconds(1000, 0, fast) < prefill_seconds(1000, 0, slow) / 10


def test_another_incarnation_starts_from_its_pool() -> None:
    world = World("p1", "p2")
    for _ in range(50):
        world.models.observe_prefill(P, 1000, 0, 10.0)
    world.join(record("p1", epoch=Epoch(2)))
    assert prefill_seconds(1000, 0, coefficients(world, "p1", PREFILL_COEFFICIENTS)) == pytest.approx(10.0, rel=0.3)
    world.join(record("d9"))
    assert coefficients(world, "d9", PREFILL_COEFFICIENTS) == pytest.approx([0.01, 2e-4, 2e-9]), "of another pool"


# --- links ---


def exposed(world: World, seconds_later: float = 0.0) -> float:
    world.clock.at += seconds_later
    world.set("p1", prefill_a=1e-6, prefill_b=1e-12, prefill_c=0.0)
    return world.place().winner.transfer_total_s


def test_a_pair_goes_by_its_own_goodput_and_fades_into_its_class() -> None:
    world = World("p1", "p2", "d1", **REMOTE)
    world.set("p2", queued_tokens=100_000)
    by_prior = exposed(world)
    for _ in range(60):
        world.models.observe_link(P, D, 1e7, 0.002)
    assert exposed(world) == pytest.approx(0.002 + 1000 * 10_000 / 1e7, rel=0.05)
    for _ in range(100):
        world.models.observe_link(WorkerId("p2"), D, 4e9, 2e-4)
    world.clock.at += 600.0
    assert exposed(world) == pytest.approx(by_prior, rel=0.2), "nothing crossed it for long: as good as its class"


def test_what_waits_for_a_link_delays_and_drains() -> None:
    world = World("p1", "d1", **REMOTE)
    goodput = world.config.links.same_host_bytes_per_s
    idle = exposed(world)
    world.models.observe_link(P, D, None, None, queued_bytes=int(goodput))
    assert exposed(world) == pytest.approx(idle + 1.0, rel=0.01)
    assert exposed(world, 0.5) == pytest.approx(idle + 0.5, rel=0.01)
    assert exposed(world, 5.0) == pytest.approx(idle, rel=0.01)


def test_compression_is_learned_per_quality_floor() -> None:
    world = World("p1", "d1", **REMOTE)
    for _ in range(60):
        world.models.observe_transfer(
            P, D, quality_floor=0.97, kv_bytes=10**6, wire_bytes=10**6 // 4, exposed_s=0.1, predicted_s=None
        )
    ratios = world.models.links.classes[0]["ratio"]
    assert ratios == pytest.approx([1.0, 1.0, 4.0, 1.0], rel=0.01)
    assert [floor_class(floor) for floor in (1.0, 0.99, 0.98, 0.97, 0.5)] == [0, 1, 2, 2, 3]
    exact, lossy = world.place(world.query()), world.place(world.query(quality_floor=0.97))
    assert lossy.winner.transfer_total_s < exact.winner.transfer_total_s


@pytest.mark.parametrize("truth", [0.2, 1.0, 3.0])
def test_what_is_exposed_is_corrected_by_what_was(truth: float) -> None:
    world = World("p1", record("d1", kv_bytes_per_token=1_000_000), **REMOTE)
    modelled = world.place().terms.transfer_s
    for _ in range(80):
        predicted = world.place().terms.transfer_s
        world.models.observe_transfer(
            P, D, quality_floor=1.0, kv_bytes=10**9, wire_bytes=10**9, exposed_s=truth * modelled, predicted_s=predicted
        )
    assert world.place().terms.transfer_s == pytest.approx(truth * modelled, rel=0.02)


def test_small_transfers_and_unknown_workers_teach_nothing() -> None:
    world = World("p1", "d1", **REMOTE)
    before = world.place().terms
    nobody = WorkerId("nobody")
    world.models.observe_transfer(P, D, quality_floor=1.0, kv_bytes=10, wire_bytes=5, exposed_s=9.0, predicted_s=0.1)
    world.models.observe_transfer(
        nobody, D, quality_floor=1.0, kv_bytes=10**6, wire_bytes=5, exposed_s=9.0, predicted_s=0.1
    )
    world.models.observe_link(P, nobody, 1.0, 1.0)
    world.models.observe_prefill(nobody, 10, 0, 1.0)
    world.models.observe_prefill(P, 10, 0, 0.0)
    world.models.observe_load(nobody, load_report(num_running=1, decode_step_s=1.0))
    assert world.place().terms == before


def test_links_are_forgotten_with_either_end_and_the_table_of_pairs_is_bounded() -> None:
    world = World(*[f"p{idx}" for idx in range(40)], *[f"d{idx}" for idx in range(40)], links={"max_learned": 64})
    links = world.models.links
    for p in range(40):
        for d in range(40):
            world.models.observe_link(WorkerId(f"p{p}"), WorkerId(f"d{d}"), 1e6, 0.1)
    assert len(links.pairs) == 64
    assert np.count_nonzero(links.pairs["key"]) > 32
    for p in range(40):
        world.join(record(f"p{p}", epoch=Epoch(2)))
    assert not links.pairs["key"].any()
