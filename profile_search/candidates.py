"""What a search tries: a grid over pipelines, some hundred of them, with what a surrogate needs to compare them. Pure.

Families (everything but how coarse): uniform steps for the entropy coder on whole planes, with and without undoing the
rotary embedding, with and without finer recent tokens, with one step for all planes or steps by how much each plane
matters to the model (`sensitivity`); levels by token with and without rotation; K by channel or by groups of tokens;
8-bit rungs. Within a family two knobs: how coarse K is, and how coarse V is.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import product

from kv_transfer.codecs.spec import PipelineSpec, Quantiser
from profile_search.sensitivity import PlaneSteps

_STEPS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 2.0)  # of a plane, in its own root mean squares
_V_FACTORS = (0.8, 1.0, 1.25)
_TOKEN_LEVELS = ((16, 16), (16, 8), (12, 8), (8, 6), (6, 6), (6, 4), (5, 4), (4, 3))
_PACKED = ((63, (0.1, 0.14)), (15, (0.36, 0.42, 0.5)), (6, (0.75, 0.85, 0.95)), (4, (1.0, 1.15, 1.3)), (3, (1.35, 1.5)))
RECENT = {"no recent": (0, 1.0), "recent": (32, 0.12), "more recent": (64, 0.25)}  # tokens, factor on their steps


@dataclass(frozen=True)
class Candidate:
    """One pipeline of the grid.

    Attributes:
        traits: what it is made of; candidates of equal traits are a family.
        coarseness: minus the nominal bits of K and of V: larger is coarser; comparable within a family.
    """

    spec: PipelineSpec
    traits: tuple[str, ...]
    coarseness: tuple[float, float]

    @cached_property
    def key(self) -> str:
        """Names the pipeline in a journal."""
        text = json.dumps(self.spec.model_dump(mode="json"), sort_keys=True)
        return blake2b(text.encode(), digest_size=8).hexdigest()


def grid(rope_theta: float | None, steps: PlaneSteps) -> list[Candidate]:
    """Return all lossy candidates for a model.

    Args:
        rope_theta: None where the rotary embedding cannot be undone.
        steps: what `sensitivity` found.
    """
    made = [
        *_uniform_steps(rope_theta, steps),
        *_packed_steps(rope_theta),
        *_by_token(),
        *_by_channel(),
        *_eight_bits(),
    ]
    return list({candidate.key: candidate for candidate in made}.values())


def exact() -> dict[str, PipelineSpec]:
    """Return the pipelines that need no judge, by name."""
    return {"none": PipelineSpec(kind="none"), "lossless": PipelineSpec(kind="lossless")}


def _uniform_steps(rope_theta: float | None, steps: PlaneSteps) -> Iterator[Candidate]:
    thetas = (None,) if rope_theta is None else (None, rope_theta)
    for theta, is_weighted, (recent, (tokens, finer)) in product(thetas, (False, True), RECENT.items()):
        traits = ("uniform", "rotary" if theta is None else "unrotary", recent, "weighted" if is_weighted else "flat")
        finest_k, finest_v = (min(map(min, half)) if is_weighted else 1.0 for half in (steps.k, steps.v))
        for k_step, factor in product(_STEPS, _V_FACTORS):
            v_step = k_step * factor
            spec = PipelineSpec(
                rope_theta=theta,
                center_v=True,
                rotate_v=True,
                k=_uniform(_levels(k_step * finest_k), k_step),
                v=_uniform(_levels(v_step * finest_v), v_step),
                k_plane_steps=steps.k if is_weighted else (),
                v_plane_steps=steps.v if is_weighted else (),
                recent_tokens=tokens,
                k_recent=_uniform(255, k_step * finer) if tokens else None,
                v_recent=_uniform(255, v_step * finer) if tokens else None,
            )
            yield Candidate(spec, traits, (math.log2(k_step), math.log2(v_step)))


def _packed_steps(rope_theta: float | None) -> Iterator[Candidate]:
    """Uniform steps without the entropy coder, which takes a third of the time: few levels, and some values clipped.

    Planes share their step: finer ones would be clipped more.
    """
    for levels, tried in _PACKED:
        for step in tried:
            quantiser, recent = _uniform(levels, step), _uniform(255, 0.1)
            spec = PipelineSpec(
                rope_theta=rope_theta,
                center_v=True,
                rotate_v=True,
                k=quantiser,
                v=quantiser,
                recent_tokens=32,
                k_recent=recent,
                v_recent=recent,
                entropy="none",
            )
            nominal = -math.log2(levels)
            yield Candidate(spec, ("packed", f"step {step}"), (nominal, nominal))


def _levels(finest_step: float) -> int:
    """Return levels that clip no plane before 2.5 root mean squares; odd, since most values are near zero."""
    return 15 if finest_step * 7 >= 2.5 else 63


def _uniform(levels: int, step: float) -> Quantiser:
    return Quantiser(levels=levels, axis="tensor", step_rms=round(step, 4))


def _by_token() -> Iterator[Candidate]:
    traits_of = {True: "rotated", False: "unrotated"}
    for is_rotated, is_coded, recent, (k, v) in product((True, False), (True, False), (0, 32), _TOKEN_LEVELS):
        spec = PipelineSpec(
            center_k=is_rotated,
            rotate_k=is_rotated,
            rotate_v=is_rotated,
            k=Quantiser(levels=k),
            v=Quantiser(levels=v),
            recent_tokens=recent,
            k_recent=Quantiser(levels=255) if recent else None,
            v_recent=Quantiser(levels=255) if recent else None,
            entropy="zstd" if is_coded else "none",
        )
        traits = ("token", traits_of[is_rotated], "coded" if is_coded else "packed", f"recent {recent}")
        yield Candidate(spec, traits, (-math.log2(k), -math.log2(v)))


def _by_channel() -> Iterator[Candidate]:
    for axis, (k, v) in product(("channel", "group"), _TOKEN_LEVELS):
        quantiser = Quantiser(levels=k, axis="channel" if axis == "channel" else "group", symmetric=False)
        spec = PipelineSpec(center_k=False, rotate_k=False, rotate_v=True, k=quantiser, v=Quantiser(levels=v))
        yield Candidate(spec, (f"K by {axis}",), (-math.log2(k), -math.log2(v)))


def _eight_bits() -> Iterator[Candidate]:
    yield Candidate(PipelineSpec(kind="fp8"), ("fp8",), (-7.0, -7.0))
    for levels in (255, 127, 63, 31):
        quantiser = Quantiser(levels=levels)
        spec = PipelineSpec(center_k=False, rotate_k=False, k=quantiser, v=quantiser)
        yield Candidate(spec, ("8 bits",), (-math.log2(levels), -math.log2(levels)))
