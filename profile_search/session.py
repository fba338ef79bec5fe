"""A search from beginning to end: model, prompts, candidates, costs, quality, acceptance, library, picture.

1. Load the model, prefill the search prompts, take their references.
2. Measure how much each plane matters, make the grid, measure every candidate's ratio and codec time.
3. Search (or, exhaustively, judge everything: first the search, so that the two can be compared).
4. Judge the finalists on the acceptance prompts, write the library and the picture.

Everything measured goes to the journal next to the library, so a search that was killed goes on where it was. Frames
are cut as the engine hands them over: whole layers, `engine.injection.PREFILL_TOKENS` tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.injection import PREFILL_TOKENS, InjectionHarness, rope_theta_of
from kv_transfer.codecs.spec import CODEC_VERSION, PipelineSpec
from kv_transfer.machine import machine_fingerprint
from kv_transfer.profile import ProfileLibrary, save_library
from profile_search import library as libraries
from profile_search.candidates import Candidate, exact, grid
from profile_search.cost import COST_PROMPTS, Cost, measure_cost
from profile_search.front import FloorComparison, Judged, compare
from profile_search.journal import Journal
from profile_search.judge import InjectionJudge
from profile_search.observations import Observations
from profile_search.plot import draw
from profile_search.prompts import load_prompts
from profile_search.search import FLOORS, Costed, search
from profile_search.sensitivity import PlaneSteps, measure_steps

Told = Callable[[str, int, int], None]  # stage, done, of


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What a search did.

    Attributes:
        num_judged: prompts judged by the search, and by judging everything.
        comparison: against everything; empty when not exhaustive.
    """

    library: ProfileLibrary
    num_candidates: int
    num_judged: int
    num_exhaustive: int
    comparison: tuple[FloorComparison, ...]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Attributes: prompts: None is the file next to the checkpoint; picture: None draws none."""

    model: Path
    output: Path
    prompts: Path | None = None
    picture: Path | None = None
    num_threads: int = 1
    max_prompts: int | None = None
    is_exhaustive: bool = False

    @property
    def journal(self) -> Path:
        return self.output.with_name(self.output.name + ".journal.jsonl")


def run_search(settings: SearchSettings, told: Told = lambda stage, done, of: None) -> SearchReport:
    """Search and write the library.

    Raises:
        ConfigError: the model, the prompts or the journal cannot be used, or the extra `profiles` is not installed.
    """
    told("loading the model", 0, 1)
    harness = InjectionHarness.load(settings.model, num_threads=settings.num_threads)
    prompts = load_prompts(settings.model, settings.prompts, limit=settings.max_prompts)
    journal = Journal(
        settings.journal,
        {
            "weights_version": harness.info.weights_version,
            "codec_version": CODEC_VERSION,
            "machine": machine_fingerprint(),
            "prompts": prompts.digest,
        },
    )
    try:
        told("prefilling the search prompts", 0, 1)
        judge = InjectionJudge(harness, prompts.search)
        observations = Observations(judge, journal)
        theta = rope_theta_of(settings.model)
        candidates = grid(theta, _plane_steps(harness, judge, theta, journal))
        kvs = [reference.kv for reference in judge.references]
        pool, exacts = _measure_costs(candidates, observations, kvs, told)
        num_total = len(pool) * observations.num_prompts

        def told_search(floor: float, num_left: int) -> None:
            told(f"quality {floor:.3f}, {num_left} candidates left", observations.num_scores, num_total)

        search(pool, observations, told=told_search)
        num_judged = observations.num_scores
        found = libraries.judged_of(pool, observations)
        comparison: tuple[FloorComparison, ...] = ()
        everything = found
        if settings.is_exhaustive:
            everything = _judge_all(pool, observations, told)
            comparison = tuple(compare(found, everything, FLOORS))
        del judge
        told("prefilling the acceptance prompts", 0, 1)
        acceptance = Observations(InjectionJudge(harness, prompts.acceptance), journal, split="acceptance")
        chosen = libraries.finalists(found, FLOORS)
        told(f"acceptance of {len(chosen)} finalists", 0, 1)
        accepted = libraries.accept(chosen, acceptance, FLOORS)
        library = ProfileLibrary(
            model=harness.info.name,
            weights_version=harness.info.weights_version,
            codec_version=CODEC_VERSION,
            machine=machine_fingerprint(),
            prompts_digest=prompts.digest,
            profiles=(*(libraries.exact_profile(name, exact()[name], cost) for name, cost in exacts), *accepted),
        )
        save_library(library, settings.output)
        if settings.picture is not None:
            draw(everything, library.profiles, f"KV profiles of {library.model}", settings.picture)
        told("done", 1, 1)
        return SearchReport(library, len(pool), num_judged, num_total, comparison)
    finally:
        journal.close()


def _plane_steps(harness: InjectionHarness, judge: InjectionJudge, theta: float | None, journal: Journal) -> PlaneSteps:
    """Read from the journal, or measure: another measurement would make another grid."""
    for row in journal.rows:
        if row["what"] == "planes":
            return PlaneSteps(*(tuple(tuple(line) for line in row[half]) for half in ("k", "v")))
    steps = measure_steps(harness, judge.references, theta)
    journal.append({"what": "planes", "k": steps.k, "v": steps.v})
    return steps


def _measure_costs(
    candidates: Sequence[Candidate], observations: Observations, kvs: Sequence[Tensor], told: Told
) -> tuple[list[Costed], list[tuple[str, Cost]]]:
    """Return the candidates that make KV smaller at all, and the exact pipelines, with their costs."""

    def measure(spec: PipelineSpec) -> Cost:
        return measure_cost(spec, kvs[:COST_PROMPTS], PREFILL_TOKENS)

    frame_bytes = kvs[0].numel() * kvs[0].element_size() // kvs[0].shape[3] * PREFILL_TOKENS
    pool = []
    for done, candidate in enumerate(candidates):
        told("ratio and codec time", done, len(candidates))
        cost = observations.cost(candidate, measure)
        one = Costed(candidate, cost, cost.codec_s(frame_bytes))
        if one.cost.ratio > 1.0:
            pool.append(one)
    exacts = [
        (name, observations.cost(Candidate(spec, ("exact",), (0.0, 0.0)), measure)) for name, spec in exact().items()
    ]
    return pool, exacts


def _judge_all(pool: Sequence[Costed], observations: Observations, told: Told) -> list[Judged]:
    for done, one in enumerate(pool):
        told("quality of everything", done, len(pool))
        observations.judged(one.candidate, observations.num_prompts)
    return libraries.judged_of(pool, observations)
