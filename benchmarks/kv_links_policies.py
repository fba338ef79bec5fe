"""Who chooses the profile in a run of the links benchmark: nobody, one static profile, the controller, an oracle."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from benchmarks.kv_links_model import MODEL
from core.clock import MonotonicClock
from core.errors import ConfigError
from core.ids import TransferId
from core.layout import KvLayout
from kv_transfer.choice import AlwaysRaw, Choice, ProfileChooser, TransferObservation, TransferQuestion
from kv_transfer.codec import RAW, Encoder
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.codecs.spec import PipelineSpec
from kv_transfer.config import KvTransferConfig
from kv_transfer.controller.opening import open_chooser
from kv_transfer.profile import NONE, Profile, find_library

CONTROLLER, ORACLE = "controller", "oracle"
Schedule = Sequence[tuple[float, float, str]]  # (begins at, of requests with this floor, profile), ascending in time


@dataclass(frozen=True, slots=True)
class Shelf:
    """The profiles there are: pipelines and encoders by name, and what was measured of them, if it was."""

    pipelines: Mapping[str, PipelineSpec]
    encoders: Mapping[str, Encoder]
    profiles: tuple[Profile, ...]

    def admissible(self, floor: float) -> list[str]:
        """Return the names of those that meet a floor; without measurements, all."""
        if not self.profiles:
            return list(self.encoders)
        return [profile.name for profile in self.profiles if profile.meets(floor)]


def open_shelf(library: str, layout: KvLayout) -> Shelf:
    """Return the profiles of tandem-tiny's library; the hand-made ladder when `library` is "ladder"."""
    if library == "ladder":
        specs = dict(ladder())
        profiles: tuple[Profile, ...] = ()
    else:
        found = find_library(library, MODEL)
        if found is None:
            raise ConfigError("models/tiny has no library of profiles; `tandem profile search` makes one")
        profiles = found.validated(layout)
        specs = {profile.name: profile.pipeline for profile in profiles}
    return Shelf(specs, {name: RAW if name == NONE else open_encoder(spec) for name, spec in specs.items()}, profiles)


class StaticProfile:
    """Every transfer under the same profile."""

    def __init__(self, name: str, encoder: Encoder) -> None:
        self._choice = Choice(name, encoder, None, "static")

    def choose(self, question: TransferQuestion) -> Choice:
        return self._choice

    def observe(self, observation: TransferObservation) -> None:
        pass


class Scheduled:
    """The oracle's replay: profiles by the time of the question and its floor. Before the start: no compression."""

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        self._encoders = encoders
        self._schedule: Schedule = []

    def start(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def choose(self, question: TransferQuestion) -> Choice:
        now, floor = time.monotonic(), question.terms.quality_floor
        names = [name for at, begins_floor, name in self._schedule if at <= now and begins_floor == floor]
        name = names[-1] if names else NONE
        return Choice(name, self._encoders[name], None, ORACLE)

    def observe(self, observation: TransferObservation) -> None:
        pass


@dataclass
class Recorded:
    """Another chooser, and what it was asked and told."""

    inner: ProfileChooser
    chosen: dict[TransferId, Choice] = field(default_factory=dict)
    asked: dict[TransferId, TransferQuestion] = field(default_factory=dict)
    told: dict[TransferId, TransferObservation] = field(default_factory=dict)

    def start(self, schedule: Schedule) -> None:
        """The clock of the run starts."""
        if isinstance(self.inner, Scheduled):
            self.inner.start(schedule)

    def choose(self, question: TransferQuestion) -> Choice:
        choice = self.inner.choose(question)
        self.chosen[question.transfer_id] = choice
        self.asked[question.transfer_id] = question
        return choice

    def observe(self, observation: TransferObservation) -> None:
        self.told[observation.transfer_id] = observation
        self.inner.observe(observation)


def open_policy(name: str, shelf: Shelf, config: KvTransferConfig, seed: int) -> Recorded:
    """Return a fresh chooser; it knows nothing of earlier runs."""
    inner: ProfileChooser
    if name == NONE:
        inner = AlwaysRaw()
    elif name == CONTROLLER:
        # Its metrics get a registry of their own: there is one controller per run in this process.
        inner = open_chooser(config, shelf.profiles, MonotonicClock(), seed=seed, registry=CollectorRegistry())
    elif name == ORACLE:
        inner = Scheduled(shelf.encoders)
    else:
        inner = StaticProfile(name, shelf.encoders[name])
    return Recorded(inner)
