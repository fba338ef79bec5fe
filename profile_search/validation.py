"""Whether a library still tells the truth: its profiles measured again, here and now, against what they state."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.injection import PREFILL_TOKENS, InjectionHarness
from kv_transfer.machine import machine_fingerprint
from kv_transfer.profile import Profile, ProfileLibrary, Quality
from profile_search.cost import COST_PROMPTS, Cost, measure_cost
from profile_search.judge import InjectionJudge
from profile_search.prompts import load_prompts
from profile_search.scores import quality_of

RATIO_TOLERANCE = 0.03
TIME_TOLERANCE = 2.0  # a busy neighbour is no broken promise
_FRAME_BYTES = 2**20
_BLOCK_SIZE = 16  # any: profiles do not depend on it


@dataclass(frozen=True, slots=True)
class Finding:
    """One profile, measured again. `broken` says what no longer holds, in words; empty: all that was compared does."""

    profile: Profile
    cost: Cost
    quality: Quality | None
    broken: tuple[str, ...]
    has_same_prompts: bool

    @property
    def verdict(self) -> str:
        """In words, for people."""
        holds = "holds" if self.has_same_prompts else "holds (other prompts: the ratio is not compared)"
        return "; ".join(self.broken) or holds


def validate(
    library: ProfileLibrary,
    model: Path,
    prompts_file: Path | None = None,
    *,
    num_threads: int = 1,
    max_prompts: int | None = None,
) -> Iterator[Finding]:
    """Measure every profile on the acceptance prompts of `model` and yield what was found.

    Raises:
        ProfileRefused: the library holds for other weights or other codecs.
        ConfigError: the model or its prompts cannot be used.
    """
    harness = InjectionHarness.load(model, num_threads=num_threads)
    profiles = library.validated(harness.info.kv_layout(_BLOCK_SIZE))
    prompts = load_prompts(model, prompts_file, limit=max_prompts)
    judge = InjectionJudge(harness, prompts.acceptance)
    kvs = [reference.kv for reference in judge.references]
    is_measured_here = library.machine == machine_fingerprint()
    has_same_prompts = library.prompts_digest in (None, prompts.digest)
    for profile in profiles:
        quality = None
        if not profile.is_lossless:
            quality = quality_of([judge.score(profile.pipeline, at) for at in range(judge.num_prompts)])
        cost = measure_cost(profile.pipeline, kvs if quality else kvs[:COST_PROMPTS], PREFILL_TOKENS)
        contradicted = broken(
            profile, cost, quality, is_measured_here=is_measured_here, has_same_prompts=has_same_prompts
        )
        yield Finding(profile, cost, quality, contradicted, has_same_prompts)


def broken(
    profile: Profile, cost: Cost, quality: Quality | None, *, is_measured_here: bool, has_same_prompts: bool = True
) -> tuple[str, ...]:
    """Return what `profile` states that these measurements contradict. Pure.

    Agreement is broken when the new estimate is below the stated interval, or, on other prompts than the library's,
    when all of the new interval is; a ratio when it is less by more than the tolerance, but on other prompts it is
    another (their lengths matter); times only where they were measured on this machine.
    """
    found = []
    stated = profile.quality
    if stated is not None and quality is not None:
        agreement = quality.agreement if has_same_prompts else quality.agreement_high
        if agreement < stated.agreement_low:
            found.append(f"agreement {agreement:.4f} is below the stated {stated.agreement_low:.4f}")
    if has_same_prompts and cost.ratio < profile.ratio * (1 - RATIO_TOLERANCE):
        found.append(f"ratio {cost.ratio:.2f} is less than the stated {profile.ratio:.2f}")
    if is_measured_here:
        for name, was, now in (("encode", profile.encode, cost.encode), ("decode", profile.decode, cost.decode)):
            stated_s, measured_s = was.seconds(_FRAME_BYTES), now.seconds(_FRAME_BYTES)
            if measured_s > TIME_TOLERANCE * stated_s + 1e-4:
                found.append(f"{name} of 1 MiB takes {1e3 * measured_s:.2f} ms, not the stated {1e3 * stated_s:.2f}")
    return tuple(found)
