"""The search for profiles, against a judge that is a formula: what it finds, what it drops, how it goes on."""

import math
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.profile import CodecTime
from profile_search.candidates import Candidate
from profile_search.cost import Cost, measure_cost
from profile_search.front import Judged, best_at, compare, pareto
from profile_search.journal import Journal
from profile_search.library import accept, finalists, judged_of
from profile_search.observations import Observations
from profile_search.scores import PromptScore, disagreement, quality_of, wilson
from profile_search.search import (
    Costed,
    Verdict,
    gain,
    is_coarser,
    is_dominated,
    search,
    verdict,
)

NUM_PROMPTS = 64
POSITIONS = 50
FLOORS = (0.98, 0.95)


class FormulaJudge:
    """Agreement falls with the square of the steps of K and V, and faster in one family than in the other."""

    num_prompts = NUM_PROMPTS

    def __init__(self) -> None:
        self.num_asked = 0

    def score(self, spec: PipelineSpec, prompt_idx: int) -> PromptScore:
        self.num_asked += 1
        expected = POSITIONS * (1 - agreement_of(spec))
        wrong = math.floor(expected + (prompt_idx * 0.618) % 1)  # low-discrepancy: the mean is what was expected
        return PromptScore(POSITIONS, POSITIONS - wrong, 0.01 * wrong, 1000, 100)


def agreement_of(spec: PipelineSpec) -> float:
    assert spec.k.step_rms is not None
    assert spec.v.step_rms is not None
    return 1.0 - (0.02 if spec.rotate_v else 0.05) * (spec.k.step_rms**2 + 0.5 * spec.v.step_rms**2)


def pool_of(size: int = 9) -> list[Costed]:
    pool = []
    for is_rotated in (True, False):
        for k_step in np.linspace(0.2, 2.0, size):
            for v_step in np.linspace(0.2, 2.0, size):
                spec = PipelineSpec(
                    rotate_v=is_rotated,
                    k=Quantiser(levels=16, axis="tensor", step_rms=float(k_step)),
                    v=Quantiser(levels=16, axis="tensor", step_rms=float(v_step)),
                )
                ratio = 16 / (4 - 0.5 * math.log2(k_step * v_step)) * (1.0 if is_rotated else 0.97)
                time = CodecTime(fixed_s=0.0, s_per_byte=1e-9 if is_rotated else 5e-10)
                candidate = Candidate(spec, ("rotated" if is_rotated else "plain",), (float(k_step), float(v_step)))
                pool.append(Costed(candidate, Cost(ratio, time, time), 2 * time.seconds(2**20)))
    return pool


def exhaustive(pool: list[Costed]) -> list[Judged]:
    observations = Observations(FormulaJudge())
    for one in pool:
        observations.judged(one.candidate, NUM_PROMPTS)
    return judged_of(pool, observations)


def test_the_search_finds_what_judging_everything_finds_for_a_fraction_of_it() -> None:
    pool, judge = pool_of(), FormulaJudge()
    observations = Observations(judge)
    search(pool, observations, FLOORS)
    everything = exhaustive(pool)
    found = judged_of(pool, observations)
    assert all(row.is_same for row in compare(found, everything, FLOORS))
    for floor in FLOORS:
        ours, theirs = best_at(found, floor), best_at(everything, floor)
        assert ours is not None
        assert theirs is not None
        assert ours.one.cost.ratio >= 0.99 * theirs.one.cost.ratio
    assert judge.num_asked == observations.num_scores < 0.3 * NUM_PROMPTS * len(pool)


def test_what_is_dropped_unasked_is_never_feasible_and_better() -> None:
    pool = pool_of(6)
    truth = {item.one.candidate.key: item for item in exhaustive(pool)}
    for floor in FLOORS:
        for shown in (pool[::5], pool[::7], pool[1::3]):
            able = [one for one in shown if truth[one.candidate.key].agreement_low >= floor]
            unable = [one.candidate for one in shown if truth[one.candidate.key].agreement_low < floor]
            for one in pool:
                if is_dominated(one, able):
                    assert gain(one, able) <= 0
                if is_coarser(one.candidate, unable):
                    assert truth[one.candidate.key].agreement_low < floor


def test_a_candidate_is_only_given_up_early_when_it_is_clearly_below() -> None:
    def scores(wrong: int, prompts: int) -> list[PromptScore]:
        return [PromptScore(POSITIONS, POSITIONS - wrong - (at % 2), 0.0, 1, 1) for at in range(prompts)]

    assert verdict([], 0.97, 64) is Verdict.OPEN
    assert verdict(scores(10, 8), 0.97, 64) is Verdict.INFEASIBLE
    assert verdict(scores(1, 8), 0.97, 64) is Verdict.OPEN
    assert verdict(scores(0, 64), 0.97, 64) is Verdict.FEASIBLE
    assert verdict(scores(1, 64), 0.97, 64) is Verdict.INFEASIBLE  # the mean is 0.97, the lower bound is not


def test_bounds_hold_the_estimate_and_shrink_with_prompts() -> None:
    generator = np.random.default_rng(3)
    rows = [PromptScore(50, 50 - int(wrong), 0.1 * wrong, 1, 1) for wrong in generator.poisson(1.5, 256)]
    few, many = quality_of(rows[:16]), quality_of(rows)
    for quality in (few, many):
        assert quality.agreement_low < quality.agreement < quality.agreement_high
        assert quality.kl_low < quality.kl < quality.kl_high
    assert many.agreement_high - many.agreement_low < few.agreement_high - few.agreement_low
    assert quality_of(rows) == many
    ratio, error = disagreement(rows, len(rows))
    assert ratio == pytest.approx(1 - many.agreement)
    assert 2 * 1.96 * error == pytest.approx(many.agreement_high - many.agreement_low, rel=0.1)


def test_no_difference_seen_is_no_proof_that_there_is_none() -> None:
    quality = quality_of([PromptScore(50, 50, 0.0, 1, 1)] * 8)
    assert quality.agreement == quality.agreement_high == 1.0
    assert quality.agreement_low == wilson(400, 400)[0] < 0.995


def test_a_killed_search_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Mortal(FormulaJudge):
        def score(self, spec: PipelineSpec, prompt_idx: int) -> PromptScore:
            if self.num_asked == 300:
                raise Killed
            return super().score(spec, prompt_idx)

    pool, path, holds_for = pool_of(6), tmp_path / "journal.jsonl", {"weights_version": "w1", "prompts": "p1"}
    journal = Journal(path, holds_for)
    with pytest.raises(Killed):
        search(pool, Observations(Mortal(), journal), FLOORS)
    journal.close()
    with path.open("a") as file:
        file.write('{"what": "search", "candi')  # the line that the kill cut off
    journal, judge = Journal(path, holds_for), FormulaJudge()
    resumed = Observations(judge, journal)
    assert resumed.num_scores == 300
    search(pool, resumed, FLOORS)
    journal.close()
    assert resumed.num_scores == 300 + judge.num_asked
    everything = exhaustive(pool)
    assert all(row.is_same for row in compare(judged_of(pool, resumed), everything, FLOORS))
    journal = Journal(path, holds_for)
    journal.close()
    again = Observations(FormulaJudge(), journal)
    assert [again.scores(one.candidate) for one in pool] == [resumed.scores(one.candidate) for one in pool]


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", {"weights_version": "w1", "prompts": "p1"}).close()
    with pytest.raises(ConfigError, match=r"the journal of another search \(other prompts\)"):
        Journal(tmp_path / "journal.jsonl", {"weights_version": "w1", "prompts": "p2"})


def test_the_library_holds_what_nothing_of_its_speed_beats() -> None:
    pool = pool_of(6)
    judged = exhaustive(pool)
    front = pareto(judged)
    for item in front:
        rivals = [other for other in judged if not other.one.is_slower(item.one) and other is not item]
        assert not any(
            other.one.cost.ratio > item.one.cost.ratio and other.agreement_low > item.agreement_low for other in rivals
        )
    profiles = accept(finalists(judged, FLOORS), Observations(FormulaJudge()), FLOORS)
    assert [profile.ratio for profile in profiles] == sorted(profile.ratio for profile in profiles)
    assert len({profile.name for profile in profiles}) == len(profiles)
    assert all(profile.quality is not None and profile.quality.num_prompts == NUM_PROMPTS for profile in profiles)
    assert {floor for floor in FLOORS if any(profile.meets(floor) for profile in profiles)} == set(FLOORS)


def test_a_cost_is_measured_on_whole_prompts() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    kv = torch.randn((1, 2, 1, 600, 16), generator=generator).bfloat16()
    none = measure_cost(PipelineSpec(kind="none"), [kv], 512)
    coded = measure_cost(PipelineSpec(), [kv], 512)
    assert none.ratio == pytest.approx(kv.numel() * 2 / (kv.numel() * 2 + 2 * 1024))
    assert 2.0 < coded.ratio < 4.5
    assert coded.codec_s(2**20) > 0
