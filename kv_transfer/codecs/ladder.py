"""Hand-made rungs, named by about what they bring: a start for those who have no measured profiles."""

from collections.abc import Mapping
from types import MappingProxyType

from kv_transfer.codecs.spec import PipelineSpec, Quantiser

_FINE = Quantiser(levels=63, axis="tensor", step_rms=0.35)


def ladder(rope_theta: float | None = None) -> Mapping[str, PipelineSpec]:
    """Return the rungs by name, from exact to small. Pure.

    Args:
        rope_theta: the model's; the small rungs are smaller and better with it.
    """

    def per_token(k_levels: int, v_levels: int) -> PipelineSpec:
        return PipelineSpec(
            rope_theta=rope_theta, rotate_v=True, k=Quantiser(levels=k_levels), v=Quantiser(levels=v_levels)
        )

    def uniform(step: float, last_step: float) -> PipelineSpec:
        coarse = Quantiser(levels=15, axis="tensor", step_rms=step)
        return PipelineSpec(
            rope_theta=rope_theta,
            center_v=True,
            rotate_v=True,
            k=coarse,
            v=coarse,
            recent_tokens=64,
            k_recent=_FINE,
            v_recent=_FINE,
            protected_last=1,
            k_protected_step_rms=last_step,
        )

    return MappingProxyType(
        {
            "none": PipelineSpec(kind="none"),
            "lossless": PipelineSpec(kind="lossless"),
            "int8": PipelineSpec(rotate_k=False, center_k=False, k=Quantiser(levels=255), v=Quantiser(levels=255)),
            "fp8": PipelineSpec(kind="fp8"),
            "x4": per_token(16, 16),
            "x5": per_token(12, 8),
            "x6": uniform(0.8, 0.5),
            "x8": uniform(1.25, 0.7),
            "x10": uniform(1.8, 0.9),
        }
    )
