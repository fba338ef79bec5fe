"""From what a search judged to the library: which candidates are accepted, measured on other prompts, and their names.

The search has looked at its prompts so often that its best are best by luck too. So per floor and speed the few best of
the search are judged anew, on prompts that no decision was made on; what they show there is what the library says.
"""

from collections.abc import Iterable, Sequence
from itertools import count

from kv_transfer.codecs.spec import PipelineSpec
from kv_transfer.profile import Profile
from profile_search.cost import Cost
from profile_search.front import Judged, pareto
from profile_search.observations import Observations
from profile_search.scores import quality_of, ratio_of
from profile_search.search import Costed

FINALISTS = 8  # per floor
NEAR_MISS = 0.003  # a search's prompts can be harder as well as easier than others


def judged_of(pool: Iterable[Costed], observations: Observations) -> list[Judged]:
    """Return the candidates that were judged on all prompts."""
    found = []
    for one in pool:
        scores = observations.scores(one.candidate)
        if len(scores) >= observations.num_prompts:
            quality = quality_of(scores)
            found.append(Judged(one, quality.agreement, quality.agreement_low, quality.agreement_high))
    return found


def finalists(judged: Sequence[Judged], floors: Sequence[float]) -> list[Costed]:
    """Return the candidates with the highest ratio at each floor, near misses among them, and the front's. Pure."""
    chosen = {item.one.candidate.key: item.one for item in pareto(judged)}
    for floor in floors:
        near = [item for item in judged if item.agreement_low >= floor - NEAR_MISS]
        able = sorted(near, key=lambda item: -item.one.cost.ratio)
        chosen |= {item.one.candidate.key: item.one for item in able[:FINALISTS]}
    return list(chosen.values())


def accept(chosen: Sequence[Costed], acceptance: Observations, floors: Sequence[float]) -> list[Profile]:
    """Judge the finalists on the acceptance prompts and return the profiles worth having, by ratio.

    A profile is worth having when at some floor nothing else of its speed or faster has a higher ratio.
    """
    measured = []
    for one in chosen:
        scores = acceptance.judged(one.candidate, acceptance.num_prompts)
        measured.append((one, quality_of(scores), ratio_of(scores)))
    kept: dict[str, Profile] = {}
    for floor in floors:
        able = [item for item in measured if item[1].agreement_low >= floor]
        for one, quality, ratio in able:
            worth = (ratio, quality.agreement_low)
            if not any((other[2], other[1].agreement_low) > worth and not other[0].is_slower(one) for other in able):
                kept.setdefault(
                    one.candidate.key,
                    Profile(
                        name=_name(ratio, kept, one.candidate.key),
                        pipeline=one.candidate.spec,
                        ratio=ratio,
                        encode=one.cost.encode,
                        decode=one.cost.decode,
                        quality=quality,
                    ),
                )
    return sorted(kept.values(), key=lambda profile: profile.ratio)


def exact_profile(name: str, spec: PipelineSpec, cost: Cost) -> Profile:
    return Profile(name=name, pipeline=spec, ratio=cost.ratio, encode=cost.encode, decode=cost.decode)


def _name(ratio: float, kept: dict[str, Profile], key: str) -> str:
    """Return x<ratio>, with a number where that is taken. Pure."""
    taken = {profile.name for other, profile in kept.items() if other != key}
    base = f"x{ratio:.1f}"
    names = (base if number == 1 else f"{base}-{number}" for number in count(1))
    return next(name for name in names if name not in taken)
