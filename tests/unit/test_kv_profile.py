"""The profile library: what a file must hold, and for whom it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from core.errors import ConfigError
from core.layout import KvLayout
from kv_transfer.codecs.roundtrip import roundtrip
from kv_transfer.codecs.spec import CODEC_VERSION, PipelineSpec, Quantiser
from kv_transfer.machine import fingerprint_of, machine_fingerprint
from kv_transfer.profile import (
    CodecTime,
    Profile,
    ProfileLibrary,
    ProfileRefused,
    Quality,
    find_library,
    load_library,
    save_library,
)
from tests.model_matrix import TINY_PATH

LAYOUT = KvLayout("w1", 4, 2, 64, "bfloat16", 16)
FAST = CodecTime(fixed_s=1e-5, s_per_byte=1e-9)
GOOD = Quality(
    agreement=0.98,
    agreement_low=0.97,
    agreement_high=0.99,
    kl=0.01,
    kl_low=0.0,
    kl_high=0.02,
    num_prompts=64,
    num_positions=3000,
    confidence=0.95,
)
NONE = Profile(name="none", pipeline=PipelineSpec(kind="none"), ratio=1.0, encode=FAST, decode=FAST)
LOSSY = Profile(
    name="x8",
    pipeline=PipelineSpec(k=Quantiser(levels=7, axis="tensor", step_rms=0.7), low_heads=((0, 1),)),
    ratio=8.2,
    encode=FAST,
    decode=FAST,
    quality=GOOD,
)


def library(**changes: Any) -> ProfileLibrary:
    facts: dict[str, Any] = {
        "model": "tiny",
        "weights_version": "w1",
        "codec_version": CODEC_VERSION,
        "machine": "cpu/2/0",
        "profiles": (NONE, LOSSY),
    }
    return ProfileLibrary(**(facts | changes))


def test_a_library_survives_its_file(tmp_path: Path) -> None:
    save_library(library(), tmp_path / "kv_profiles.yaml")
    assert load_library(tmp_path / "kv_profiles.yaml") == library()
    assert [path.name for path in tmp_path.iterdir()] == ["kv_profiles.yaml"]


def test_a_file_leaves_out_what_has_its_default(tmp_path: Path) -> None:
    save_library(library(), tmp_path / "kv_profiles.yaml")
    none, lossy = (
        profile["pipeline"] for profile in yaml.safe_load((tmp_path / "kv_profiles.yaml").read_text())["profiles"]
    )
    assert none == {"kind": "none"}
    assert lossy == {
        "kind": "quantised",
        "k": {"levels": 7, "axis": "tensor", "step_rms": 0.7},
        "low_heads": [[0, 1]],
    }


def test_the_defaults_that_files_leave_out_stay_what_they_are() -> None:
    quantiser = {"levels": 16, "axis": "token", "group_tokens": 32, "symmetric": True, "clip": 1.0}
    assert PipelineSpec().model_dump(exclude_none=True) == {
        "keep_ratio": 1.0, "keep_sinks": 4, "keep_recent": 32, "kind": "quantised", "sink_tokens": 0, "tail_tokens": 0,
        "center_k": True, "center_v": False, "rotate_k": True, "rotate_v": False, "seed": 0, "k": quantiser,
        "v": quantiser, "recent_tokens": 0, "protected_first": 0, "protected_last": 0, "k_plane_steps": (),
        "v_plane_steps": (), "low_heads": (), "entropy": "zstd", "zstd_level": 1,
    }  # fmt: skip


def test_the_shipped_library_is_as_the_search_writes_it(tmp_path: Path) -> None:
    shipped = TINY_PATH / "kv_profiles.yaml"
    save_library(load_library(shipped), tmp_path / "kv_profiles.yaml")
    assert (tmp_path / "kv_profiles.yaml").read_text() == shipped.read_text()


def test_a_profile_that_was_not_validated_for_the_model_is_refused() -> None:
    with pytest.raises(ProfileRefused, match=r"not validated for this model.* w0, the model has w1"):
        library(weights_version="w0").validated(LAYOUT)
    with pytest.raises(ProfileRefused, match=rf"not validated for these codecs.* 0, this build has {CODEC_VERSION}"):
        library(codec_version=0).validated(LAYOUT)


def test_times_of_another_machine_are_a_first_guess() -> None:
    here = library().validated(LAYOUT, machine="cpu/2/0")
    there = library().validated(LAYOUT, machine="other/8/1")
    assert {profile.origin for profile in here} == {"measured on this machine"}
    assert {profile.origin for profile in there} == {"first guess: measured on cpu/2/0"}
    assert [profile.ratio for profile in here] == [profile.ratio for profile in there] == [1.0, 8.2]


@pytest.mark.parametrize(
    ("profile", "floor", "meets"),
    [(NONE, 1.0, True), (LOSSY, 1.0, False), (LOSSY, 0.97, True), (LOSSY, 0.975, False), (LOSSY, 0.0, True)],
)
def test_the_lower_bound_is_held_against_the_floor(profile: Profile, floor: float, meets: bool) -> None:
    assert profile.meets(floor) is meets


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("profiles", 1, "quality"), None, r"profiles\.1: .*x8 is lossy and states no quality"),
        (("profiles", 1, "name"), "none", "two profiles are named none"),
        (("profiles", 0, "name"), "raw", "no profile 'none'"),
        (("profiles", 1, "pipeline", "k", "levels"), 1, r"profiles\.1\.pipeline\.k\.levels: "),
        (("profiles", 1, "ratio"), 0, r"profiles\.1\.ratio: "),
        (("version",), 2, "version: "),
        (("weights",), "w1", "weights: unknown key"),
    ],
)
def test_what_a_file_must_hold(path: tuple[Any, ...], value: object, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "kv_profiles.yaml"
    save_library(library(), file)
    data = yaml.safe_load(file.read_text())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=problem):
        load_library(file)


def test_which_library_a_configuration_means(tmp_path: Path) -> None:
    assert find_library("auto", tmp_path) is None
    save_library(library(), tmp_path / "kv_profiles.yaml")
    assert find_library("auto", tmp_path) == library()
    assert find_library("auto", tmp_path / "config.json") == library()
    assert find_library("none", tmp_path) is None
    assert find_library(str(tmp_path / "kv_profiles.yaml"), Path("elsewhere")) == library()
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read"):
        find_library(str(tmp_path / "absent.yaml"), tmp_path)


def test_a_machine_is_its_processor_and_how_many_of_it() -> None:
    epyc = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: avx2 avx512\nMHz : 1\n\nprocessor: 1\n"
    assert fingerprint_of(epyc, 2).startswith("AMD EPYC/2/")
    assert fingerprint_of(epyc, 2) == fingerprint_of(epyc.replace("MHz : 1", "MHz : 2"), 2)
    assert fingerprint_of(epyc, 2) != fingerprint_of(epyc, 4)
    assert fingerprint_of(epyc, 2) != fingerprint_of(epyc.replace(" avx512", ""), 2)
    assert machine_fingerprint() == machine_fingerprint()


def test_a_plane_with_a_finer_step_arrives_closer() -> None:
    kv = torch.randn((2, 2, 2, 64, 16), generator=torch.Generator().manual_seed(0)).bfloat16()
    quantiser = Quantiser(levels=64, axis="tensor", step_rms=0.5)
    recent = Quantiser(levels=255, axis="tensor", step_rms=0.1)
    steps = ((1.0, 0.25), (1.0, 1.0))

    def error(**fields: Any) -> torch.Tensor:
        spec = PipelineSpec(k=quantiser, v=quantiser, **fields)
        return (roundtrip(spec, kv, num_tokens=64)[0].float() - kv.float()).pow(2).mean(dim=(3, 4)).sqrt()

    finer = error(k_plane_steps=steps) / error()
    assert finer[0, 0, 1] == pytest.approx(0.25, rel=0.1)
    assert finer.flatten().tolist().count(1.0) == finer.numel() - 1
    recent_too = error(k_plane_steps=steps, recent_tokens=64, k_recent=recent, v_recent=recent)
    assert recent_too[0, 0, 1] < 0.4 * recent_too[0, 0, 0]
    with pytest.raises(ConfigError, match="plane steps are of 1 layers, the model has 2"):
        error(v_plane_steps=steps[:1])
