"""Hand-made rungs, named by about what they bring: a start for those who have no measured profiles."""

from collections.abc import Mapping
from types import MappingProxyType

from kv_transfer.codecs.spec import PipelineSpec, Quantiser


def _rung(k_levels: int, v_levels: int) -> PipelineSpec:
    return PipelineSpec(rotate_v=True, k=Quantiser(levels=k_levels), v=Quantiser(levels=v_levels))


_LADDER = MappingProxyType(
    {
        "none": PipelineSpec(kind="none"),
        "lossless": PipelineSpec(kind="lossless"),
        "int8": PipelineSpec(rotate_k=False, center_k=False, k=Quantiser(levels=255), v=Quantiser(levels=255)),
        "fp8": PipelineSpec(kind="fp8"),
        "x4": _rung(16, 16),
        "x5": _rung(12, 8),
        "x6": _rung(8, 6),
        "x8": _rung(5, 4),
    }
)


def ladder() -> Mapping[str, PipelineSpec]:
    """Return the rungs by name, from exact to small. Pure."""
    return _LADDER
