"""Goodput definitions on cases small enough to count by hand; intervals; traces."""

import math
import random
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.service_class import NO_SLO, Slo
from simulator import goodput
from simulator.arrivals import at_speed, gamma, poisson, spread_in_bins
from simulator.confidence import cross_correlation, estimate, paired
from simulator.goodput import Targets
from simulator.machines import MACHINES, get_machine
from simulator.outcomes import Outcome, Run, SimulatedRequest
from simulator.traces import read_trace

_TARGETS = Targets(ttft_s=1.0, tpot_s=0.10, tbt_s=0.20, max_gap_s=0.50)


def _outcome(
    ttft_s: float | None, gaps: tuple[tuple[float, int], ...] = (), failure: str = "", slo: Slo = NO_SLO
) -> Outcome:
    num_gaps = sum(count for _, count in gaps)
    total_s = None if ttft_s is None else ttft_s + sum(gap_s * count for gap_s, count in gaps)
    request = SimulatedRequest("r", 0.0, 100, 1 + num_gaps, slo=slo)
    if failure:
        return Outcome(request, failure)
    return Outcome(request, "", ttft_s, total_s, 1 + num_gaps, 25, gaps)


_GOOD = _outcome(0.5, ((0.05, 20),))
_SLOW_START = _outcome(1.5, ((0.05, 20),))
_ONE_STALL = _outcome(0.5, ((0.05, 19), (0.6, 1)))  # mean .0775; slowest tenth (.6 + .05) / 2
_SLOW = _outcome(0.5, ((0.15, 20),))
_REFUSED = _outcome(None, failure="queue_full")
_ONE_TOKEN = _outcome(0.9)


@pytest.mark.parametrize(
    ("outcome", "distserve", "mooncake", "pd_serve", "past_future"),
    [
        pytest.param(_GOOD, True, True, True, True, id="good"),
        pytest.param(_SLOW_START, False, False, False, False, id="late-first-token"),
        pytest.param(_ONE_STALL, True, False, True, False, id="one-stall"),
        pytest.param(_SLOW, False, True, True, True, id="slow-everywhere"),
        pytest.param(_REFUSED, False, False, False, False, id="refused"),
        pytest.param(_ONE_TOKEN, True, True, True, True, id="one-token"),
    ],
)
def test_definitions_differ_where_they_should(
    outcome: Outcome, distserve: bool, mooncake: bool, pd_serve: bool, past_future: bool
) -> None:
    assert goodput.meets_distserve(outcome, _TARGETS) is distserve
    assert goodput.meets_mooncake(outcome, _TARGETS) is mooncake
    assert goodput.meets_pd_serve(outcome, _TARGETS) is pd_serve
    assert goodput.meets_past_future(outcome, _TARGETS) is past_future


def test_slowest_tenth_of_the_gaps() -> None:
    assert goodput.slowest_gaps_s(()) == 0
    assert goodput.slowest_gaps_s(((0.3, 1),)) == pytest.approx(0.3)
    assert goodput.slowest_gaps_s(((0.1, 18), (0.5, 1), (0.3, 1))) == pytest.approx(0.4)
    assert goodput.slowest_gaps_s(((0.1, 90), (0.2, 5), (0.4, 5))) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("outcome", "slo", "expected"),
    [
        pytest.param(_GOOD, NO_SLO, 21, id="no-target"),
        pytest.param(_GOOD, Slo(deadline_s=1.6), 21, id="deadline-kept"),
        pytest.param(_GOOD, Slo(deadline_s=1.4), 0, id="deadline-missed-by-the-last"),
        pytest.param(_GOOD, Slo(ttft_s=1.0, tpot_s=0.05), 21, id="both-kept"),
        pytest.param(_GOOD, Slo(ttft_s=0.4), 20, id="only-the-first-is-late"),
        # token k comes at .5 + .15 k and is due at 1 + .1 k: in time up to k = 10
        pytest.param(_SLOW, Slo(ttft_s=1.0, tpot_s=0.1), 11, id="falls-behind"),
        # due at .4 + .1 k: late at first, in time from k = 2 on (.6 = .6)
        pytest.param(_GOOD, Slo(ttft_s=0.4, tpot_s=0.1), 19, id="catches-up"),
        pytest.param(_REFUSED, NO_SLO, 0, id="refused"),
    ],
)
def test_tokens_in_time(outcome: Outcome, slo: Slo, expected: int) -> None:
    assert goodput.tokens_in_time(outcome, slo) == expected
    assert goodput.is_in_time(outcome, slo) is (expected == outcome.num_tokens and expected > 0)


def test_refusals_count_as_misses_of_a_run() -> None:
    run = Run((_GOOD, _GOOD, _SLOW_START, _REFUSED), (), num_workers=2, virtual_s=10.0)
    is_good = lambda outcome: goodput.meets_pd_serve(outcome, _TARGETS)  # noqa: E731
    assert goodput.attainment(run, is_good) == 0.5
    assert goodput.good_requests_per_s(run, is_good) == pytest.approx(0.2)
    assert goodput.served_per_s_and_worker(run) == pytest.approx(0.15)
    assert goodput.mean_ttft_s(run, miss_s=30.0) == pytest.approx((0.5 + 0.5 + 1.5 + 30) / 4)
    assert goodput.hit_ratio(run) == pytest.approx(0.25)
    assert goodput.tokens_in_time_per_s(run) == pytest.approx(6.3)


def test_bisection_finds_the_rate_where_attainment_falls() -> None:
    found = goodput.max_rate(lambda rate: 1.0 if rate <= 3.7 else 0.5, low=0.5, high=10)
    assert found == pytest.approx(3.7, rel=0.03)
    assert goodput.max_rate(lambda rate: 1.0, low=0.5, high=10) == 10
    assert goodput.max_rate(lambda rate: 0.0, low=0.5, high=10) == 0.5


def test_intervals_cover_their_mean_about_as_often_as_they_say() -> None:
    rng = random.Random(1)
    found = [estimate([rng.gauss(5, 2) for _ in range(5)]) for _ in range(2000)]
    covered = sum(one.low <= 5 <= one.high for one in found) / len(found)
    assert 0.935 < covered < 0.965
    assert math.isinf(estimate([3.0]).half)
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).mean == 1
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).half == 0


def test_cross_correlation() -> None:
    wave = [math.sin(t / 5) for t in range(300)]
    shifted = [math.sin((t - 4) / 5) for t in range(300)]
    assert cross_correlation(wave, [-x for x in wave]) == pytest.approx(-1)
    assert cross_correlation(wave, shifted, lag=4) == pytest.approx(1)
    assert cross_correlation(wave, [1.0] * 300) == 0


# --- traces and arrivals ----------------------------------------------------------------------------------------------


def test_arrivals_spread_inside_their_bins_only() -> None:
    stamps = [0.0] * 40 + [3.0] * 40 + [100.0]
    spread = spread_in_bins(stamps, random.Random(2))
    assert spread == sorted(spread)
    assert all(0 <= arrival < 3 for arrival in spread[:40])
    assert all(3 <= arrival < 6 for arrival in spread[40:80])  # a pause is not filled
    assert len(set(spread)) == 81
    assert at_speed(spread, 2.0)[-1] == spread[-1] / 2


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_arrivals_have_their_rate_and_variation(cv: float) -> None:
    arrivals = gamma(4.0, cv, 40_000, random.Random(3))
    gaps = [late - early for early, late in zip([0.0, *arrivals], arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.25, rel=0.05)
    assert deviation / mean == pytest.approx(cv, rel=0.05)


def test_poisson_is_gamma_of_variation_one() -> None:
    assert poisson(2.0, 10, random.Random(5)) == gamma(2.0, 1.0, 10, random.Random(5))


def test_a_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}\n'
        '{"timestamp": 1000, "input_length": 1024, "output_length": 0, "hash_ids": [0, 7]}\n'
    )
    trace = read_trace(path)
    assert [(one.stamp_s, one.prompt_tokens, one.output_tokens, one.blocks) for one in trace.requests] == [
        (0.0, 1024, 1, (0, 7)),
        (2.0, 600, 3, (0, 1)),
    ]
    assert trace.duration_s == 2
    assert len(trace.within(0, 1).requests) == 1
    assert len(read_trace(path, max_requests=1).requests) == 1


def test_an_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
        b"2023-11-16 18:17:04.0319600,3180,8"
    )
    trace = read_trace(path)
    assert [one.stamp_s for one in trace.requests] == pytest.approx([0.0, 0.052])
    assert [one.prompt_tokens for one in trace.requests] == [4808, 3180]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        pytest.param("t.txt", "", "end in", id="ending"),
        pytest.param("t.jsonl", "", "no request", id="empty"),
        pytest.param("t.jsonl", "{}\n", "record 1", id="fields"),
        pytest.param("t.csv", "a,b\n1,2\n", "record 1", id="columns"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_trace(tmp_path / name)


def test_a_machine_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ours.json"
    path.write_text(
        '{"prefill": [0.01, 1e-4, 1e-8], "decode": [0.01, 1e-3, 1e-6], "link": [1e-4, 1e9, 12],'
        ' "kv_bytes_per_token": 4096, "kv_tokens": 65536}'
    )
    machine = get_machine(str(path))
    assert (machine.name, machine.prefill.per_token_s, machine.link.num_layers) == ("ours", 1e-4, 12)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="no fit"):
        get_machine(str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match="known are"):
        get_machine("abacus")


def test_published_profiles_give_their_published_times() -> None:
    machine = MACHINES["opt13b-a100-tp1"]
    one_ms = machine.prefill.step_s([(1024, 0)]) * 1e3
    assert one_ms == pytest.approx(18.10 + 0.10191 * 1024 + 7.12e-6 * 1024**2)
    assert machine.decode.step_s(10, 5000) * 1e3 == pytest.approx(19.93 + 6.27e-4 * 5000 + 0.0385 * 10)
    assert machine.decode.step_s(100, 5000) * 1e3 == pytest.approx(7.17 + 5.80e-4 * 5000 + 0.1583 * 100)
