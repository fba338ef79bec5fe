"""The judge and the command: what the real model says under exact, good and destroyed KV, and what `validate` finds."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.profile import profile_app
from core.errors import ConfigError
from engine.injection import InjectionHarness, rope_theta_of
from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from kv_transfer.profile import CodecTime, Profile, Quality, load_library
from profile_search.candidates import grid
from profile_search.cost import Cost
from profile_search.judge import InjectionJudge
from profile_search.prompts import load_prompts
from profile_search.scores import quality_of, ratio_of
from profile_search.sensitivity import steps_of
from profile_search.validation import broken, validate
from tests.model_matrix import TINY_PATH

NUM_PROMPTS = 3


@pytest.fixture(scope="module")
def judge() -> InjectionJudge:
    prompts = load_prompts(TINY_PATH, limit=NUM_PROMPTS)
    return InjectionJudge(InjectionHarness.load(TINY_PATH, kv_cache_bytes=16 * 2**20), prompts.acceptance)


def test_exact_kv_is_no_difference_at_all(judge: InjectionJudge) -> None:
    for kind in ("none", "lossless"):
        scores = [judge.score(PipelineSpec(kind=kind), at) for at in range(NUM_PROMPTS)]
        quality = quality_of(scores)
        assert (quality.agreement, quality.kl) == (1.0, 0.0)
        assert ratio_of(scores) > (0.99 if kind == "none" else 1.3)


def test_destroyed_kv_is_noticed(judge: InjectionJudge) -> None:
    ruined = Quantiser(levels=3, axis="tensor", step_rms=16.0)
    quality = quality_of([judge.score(PipelineSpec(k=ruined, v=ruined), at) for at in range(NUM_PROMPTS)])
    assert quality.agreement < 0.85  # not 0: the continuation itself is context, and small models repeat themselves
    assert quality.kl > 0.5


def test_a_finer_pipeline_is_better_and_larger(judge: InjectionJudge) -> None:
    def seen(levels: int) -> tuple[float, float]:
        spec = PipelineSpec(rotate_v=True, k=Quantiser(levels=levels), v=Quantiser(levels=levels))
        scores = [judge.score(spec, at) for at in range(NUM_PROMPTS)]
        return quality_of(scores).kl, ratio_of(scores)

    (fine_kl, fine_ratio), (coarse_kl, coarse_ratio) = seen(64), seen(3)
    assert fine_kl < coarse_kl
    assert fine_ratio < coarse_ratio


def test_the_grid_is_some_hundred_pipelines_for_the_model(judge: InjectionJudge) -> None:
    import torch

    steps = steps_of(torch.tensor([[[1.0, 4.0], [1.0, 1.0]]]))
    assert steps.k[0][0] == pytest.approx(2 * steps.k[0][1], rel=0.01)
    candidates = grid(rope_theta_of(TINY_PATH), steps)
    assert 200 < len(candidates) < 600
    assert len({candidate.key for candidate in candidates}) == len(candidates)
    assert {candidate.spec.rope_theta for candidate in candidates} == {None, 10_000.0}
    assert all(not candidate.spec.is_lossless for candidate in candidates)


def test_what_a_measurement_contradicts_is_named() -> None:
    time = CodecTime(fixed_s=0.0, s_per_byte=1e-9)
    stated = Quality(
        agreement=0.98, agreement_low=0.97, agreement_high=0.99, kl=0.01, kl_low=0.0, kl_high=0.1,
        num_prompts=64, num_positions=1000, confidence=0.95,
    )  # fmt: skip
    worse = stated.model_copy(update={"agreement": 0.96})
    slower = CodecTime(fixed_s=0.0, s_per_byte=3e-9)
    profile = Profile(name="x8", pipeline=PipelineSpec(), ratio=8.0, encode=time, decode=time, quality=stated)
    assert broken(profile, Cost(8.0, time, time), stated, is_measured_here=True) == ()
    assert broken(profile, Cost(8.0, slower, slower), stated, is_measured_here=False) == ()
    found = broken(profile, Cost(7.0, time, slower), worse, is_measured_here=True)
    assert [line.split()[0] for line in found] == ["agreement", "ratio", "decode"]
    elsewhere = broken(profile, Cost(7.0, time, slower), worse, is_measured_here=True, has_same_prompts=False)
    assert [line.split()[0] for line in elsewhere] == ["decode"]  # 0.96, but up to 0.99
    surely_worse = worse.model_copy(update={"agreement_high": 0.965})
    found = broken(profile, Cost(7.0, time, time), surely_worse, is_measured_here=True, has_same_prompts=False)
    assert [line.split()[0] for line in found] == ["agreement"]


def test_prompts_must_be_prompts_of_both_splits(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(ConfigError, match="no validation prompts; name a JSONL file of them with --prompts"):
        load_prompts(TINY_PATH, file)
    file.write_text('{"split": "search", "token_ids": [1, 2]}\n')
    with pytest.raises(ConfigError, match="no prompt of split 'acceptance'"):
        load_prompts(TINY_PATH, file)
    file.write_text('{"split": "search", "token_ids": [1, 2]}\n{"split": "test"}\n')
    with pytest.raises(ConfigError, match="line 2 is not a prompt"):
        load_prompts(TINY_PATH, file)


def test_the_shipped_prompts_are_two_halves_of_64_that_share_nothing() -> None:
    rows = [json.loads(line) for line in (TINY_PATH / "validation_prompts.jsonl").read_text().splitlines()]
    texts = {split: {row["text"] for row in rows if row["split"] == split} for split in ("search", "acceptance")}
    assert {split: len(found) for split, found in texts.items()} == {"search": 64, "acceptance": 64}
    assert not texts["search"] & texts["acceptance"]
    for split in texts:  # every prefix is a fair sample
        assert len({(row["kind"]) for row in [row for row in rows if row["split"] == split][:3]}) == 3


def test_the_shipped_library_is_for_the_shipped_model_and_reaches_the_floors(judge: InjectionJudge) -> None:
    library = load_library(TINY_PATH / "kv_profiles.yaml")
    layout = InjectionHarness.load(TINY_PATH, kv_cache_bytes=2**20).info.kv_layout(16)
    profiles = library.validated(layout)
    assert {"none", "lossless"} <= {profile.name for profile in profiles}
    assert max(profile.ratio for profile in profiles if profile.meets(0.97)) >= 8.0
    best = max((profile for profile in profiles if profile.meets(0.97)), key=lambda profile: profile.ratio)
    scores = [judge.score(best.pipeline, at) for at in range(NUM_PROMPTS)]
    assert ratio_of(scores) > 0.7 * best.ratio  # of other lengths
    assert quality_of(scores).agreement_high > 0.97


def test_the_shipped_library_was_measured_on_the_shipped_prompts() -> None:
    library = load_library(TINY_PATH / "kv_profiles.yaml")
    assert library.prompts_digest == load_prompts(TINY_PATH).digest != load_prompts(TINY_PATH, limit=8).digest


@pytest.mark.parametrize("limit", [2, 3])
def test_fewer_prompts_refute_no_profile(limit: int) -> None:
    library = load_library(TINY_PATH / "kv_profiles.yaml").model_copy(update={"machine": "another"})
    findings = list(validate(library, TINY_PATH, max_prompts=limit))
    assert [finding.profile.name for finding in findings] == [profile.name for profile in library.profiles]
    assert [finding.broken for finding in findings] == [()] * len(findings)
    assert {finding.verdict for finding in findings} == {"holds (other prompts: the ratio is not compared)"}


def test_the_command_shows_a_library() -> None:
    shown = CliRunner().invoke(profile_app, ["show", str(TINY_PATH)])
    assert shown.exit_code == 0, shown.output
    assert "lossless" in shown.output
    assert "KV profiles of tiny" in shown.output
