"""Profiles: named pipelines with what was measured of them, and the library file that holds those of one model.

A library holds for one model (its `weights_version`), one version of the codecs, and one machine. Of another model it
is refused: a pipeline that is harmless in one model destroys another. Codec times of another machine are a first guess
and say so in `Profile.origin`; quality and ratio do not depend on the machine.

Who calls what: `tandem profile search` writes libraries (`save_library`); a worker, once its model is loaded, finds the
library (`find_library`) and asks for what holds for its layout (`ProfileLibrary.validated`).
"""

from pathlib import Path
from typing import Final, Literal, Self

import yaml
from pydantic import Field, model_validator

from core.config import ConfigModel, load_config
from core.errors import ConfigError
from core.layout import KvLayout
from kv_transfer.codecs.spec import CODEC_VERSION, PipelineSpec
from kv_transfer.machine import machine_fingerprint

LIBRARY_VERSION: Final = 1
LIBRARY_NAME = "kv_profiles.yaml"
NONE = "none"  # the profile that every library has: the bytes as they are

_HEADER = "# Measured by `tandem profile search`; docs/kv_profiles.md says how. Not meant to be edited.\n"


class ProfileRefused(ConfigError):
    """The library was not validated for this model or these codecs. The message names both sides."""


class CodecTime(ConfigModel):
    """Seconds that one core takes for one frame: a straight line over its raw bytes."""

    fixed_s: float = Field(ge=0)
    s_per_byte: float = Field(ge=0, description="per byte before coding")

    def seconds(self, raw_bytes: int) -> float:
        """Pure."""
        return self.fixed_s + self.s_per_byte * raw_bytes


class Quality(ConfigModel):
    """What a model says under this profile's KV, against what it says under its own.

    Teacher-forced over greedy continuations of held-out prompts; bounds by a bootstrap over prompts.

    Attributes:
        agreement: part of the positions whose most likely next token is the same.
        kl: mean Kullback-Leibler divergence (reference || injected) of the next-token distributions, in nats.
        confidence: of the two-sided intervals; a lower bound alone is surer.
    """

    agreement: float = Field(ge=0, le=1)
    agreement_low: float = Field(ge=0, le=1)
    agreement_high: float = Field(ge=0, le=1)
    kl: float = Field(ge=0)
    kl_low: float = Field(ge=0)
    kl_high: float = Field(ge=0)
    num_prompts: int = Field(ge=1)
    num_positions: int = Field(ge=1)
    confidence: float = Field(gt=0, lt=1)


class Profile(ConfigModel):
    """A pipeline that was measured.

    Attributes:
        ratio: raw bytes over bytes on the wire, with parameters, scales and frame headers, for prompts as served.
        encode, decode: of one frame on one core of the machine in `origin`.
        quality: None for a pipeline that is exact by construction.
        origin: where the codec times come from.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")
    pipeline: PipelineSpec
    ratio: float = Field(gt=0)
    encode: CodecTime
    decode: CodecTime
    quality: Quality | None = None
    origin: str = ""

    @model_validator(mode="after")
    def _lossy_is_measured(self) -> Self:
        if not self.is_lossless and self.quality is None:
            raise ValueError(f"profile {self.name} is lossy and states no quality")
        return self

    @property
    def is_lossless(self) -> bool:
        """Whether what arrives is equal bit for bit."""
        return self.pipeline.is_lossless

    def meets(self, quality_floor: float) -> bool:
        """Tell whether a request with this floor may use it: by the lower bound; a floor of 1 is exactness. Pure."""
        if self.is_lossless:
            return True
        return quality_floor < 1.0 and self.quality is not None and self.quality.agreement_low >= quality_floor


class ProfileLibrary(ConfigModel):
    """All profiles of one model, as the file holds them.

    Attributes:
        model: its name, for people.
        weights_version, codec_version, machine: what the measurements hold for.
        prompts_digest: names the prompts that ratio and quality were measured on; None: not noted.
    """

    version: Literal[1] = LIBRARY_VERSION
    model: str
    weights_version: str
    codec_version: int
    machine: str
    prompts_digest: str | None = None
    profiles: tuple[Profile, ...]

    @model_validator(mode="after")
    def _names_are_unique_and_none_is_there(self) -> Self:
        names = [profile.name for profile in self.profiles]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two profiles are named {twice[0]}")
        none = next((profile for profile in self.profiles if profile.name == NONE), None)
        if none is None or none.pipeline.kind != "none":
            raise ValueError(f"there is no profile {NONE!r} of kind none")
        return self

    def validated(self, layout: KvLayout, machine: str | None = None) -> tuple[Profile, ...]:
        """Return the profiles, which hold for `layout`; `origin` says whether their times were measured here. Pure.

        Args:
            machine: fingerprint; by default that of the machine which this runs on.

        Raises:
            ProfileRefused: they were measured with another model's weights, or with other codecs.
        """
        if self.weights_version != layout.weights_version:
            raise ProfileRefused(
                f"profiles of {self.model} were not validated for this model: they hold for weights "
                f"{self.weights_version}, the model has {layout.weights_version}; run `tandem profile search` for it"
            )
        if self.codec_version != CODEC_VERSION:
            raise ProfileRefused(
                f"profiles of {self.model} were not validated for these codecs: they hold for codec version "
                f"{self.codec_version}, this build has {CODEC_VERSION}; run `tandem profile search` again"
            )
        here = machine_fingerprint() if machine is None else machine
        measured = "measured on this machine" if here == self.machine else f"first guess: measured on {self.machine}"
        return tuple(profile.model_copy(update={"origin": measured}) for profile in self.profiles)

    def profile(self, name: str) -> Profile:
        """Return one by its name.

        Raises:
            ConfigError: there is none; the message names those that there are.
        """
        for profile in self.profiles:
            if profile.name == name:
                return profile
        known = ", ".join(profile.name for profile in self.profiles)
        raise ConfigError(f"no profile {name!r} for {self.model}; there are {known}")


def load_library(path: Path) -> ProfileLibrary:
    """Read a library file.

    Raises:
        ConfigError: it cannot be read or does not validate; the message has the dotted path.
    """
    return load_config(ProfileLibrary, path)


def save_library(library: ProfileLibrary, path: Path) -> None:
    """Write a library file, whole or not at all. What has its default is left out, but for version and kinds."""
    data = {"version": library.version, **library.model_dump(mode="json", exclude_defaults=True)}
    for profile, row in zip(library.profiles, data["profiles"], strict=True):
        row["pipeline"] = {"kind": profile.pipeline.kind, **row["pipeline"]}
    text = _HEADER + yaml.safe_dump(data, sort_keys=False, width=120)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def find_library(profiles: str, model_path: Path) -> ProfileLibrary | None:
    """Return the library that a configuration means; None when it means none.

    Args:
        profiles: "none"; "auto", the file next to the checkpoint if there is one; or a path.
        model_path: the checkpoint's folder (or its config.json).

    Raises:
        ConfigError: the file that was named, or found, is not a library.
    """
    if profiles == "none":
        return None
    if profiles != "auto":
        return load_library(Path(profiles))
    folder = model_path if model_path.is_dir() else model_path.parent
    path = folder / LIBRARY_NAME
    return load_library(path) if path.is_file() else None
