"""Hand-made rungs, named by about what they bring: a start for those who have no measured profiles.

The ratios are of tandem-tiny's KV for prose; noise of no structure brings less.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kv_transfer.codecs.spec import PipelineSpec, Quantiser


def ladder(rope_theta: float | None = None) -> Mapping[str, PipelineSpec]:
    """Return the rungs by name, from exact to small. Pure.

    Args:
        rope_theta: the model's; the small rungs are smaller and better with it.
    """

    def per_token(k_levels: int, v_levels: int) -> PipelineSpec:
        return PipelineSpec(
            rope_theta=rope_theta, rotate_v=True, k=Quantiser(levels=k_levels), v=Quantiser(levels=v_levels)
        )

    def uniform(levels: int, step: float, last_levels: int, last_step: float, recent_step: float) -> PipelineSpec:
        coarse = Quantiser(levels=levels, axis="tensor", step_rms=step)
        fine = Quantiser(levels=63, axis="tensor", step_rms=recent_step)
        return PipelineSpec(
            rope_theta=rope_theta,
            center_v=True,
            rotate_v=True,
            k=coarse,
            v=coarse,
            recent_tokens=64,
            k_recent=fine,
            v_recent=fine,
            protected_last=1,
            k_protected_levels=last_levels,
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
            "x6": uniform(16, 0.6, 63, 0.4, 0.25),
            "x8": uniform(15, 0.8, 63, 0.5, 0.35),
            "x10": uniform(9, 1.25, 15, 0.7, 0.35),
            "x12": uniform(15, 1.8, 15, 0.9, 0.35),
        }
    )
