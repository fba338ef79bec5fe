"""What a codec pipeline is: plain data that a profile library can hold. Nothing here computes.

A pipeline codes every frame on its own, in this order; each stage is optional and K and V have their own parameters:
the first and last tokens of the prompt stay raw; K's rotary position embedding is undone, because before it channels
have steady means; the mean of each channel is subtracted; a seeded random Hadamard transform over head_dim spreads
outliers; integer levels, other ones for the most recent tokens, which attention looks at most; digits packed into
bytes; entropy coding.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config import ConfigModel
from kv_transfer.token_selection import TokenSelection

CODEC_VERSION = 1  # of the coded bytes: frames of another version are refused, measurements of another are void

Axis = Literal["token", "group", "channel", "tensor"]
Levels = Field(ge=2, le=256)
PlaneStep = Annotated[float, Field(ge=0.01, le=100.0)]


class Quantiser(ConfigModel):
    """Integer levels, evenly spaced, over the values of one (layer, K or V, head).

    Attributes:
        levels: how many.
        axis: which values share a scale: one token's; `group_tokens` successive tokens' of one channel; one channel's
            in the frame; all in the frame.
        symmetric: levels are centred on zero and only a scale is sent; otherwise the least value is sent too.
        clip: the part of the largest magnitude that the levels span; values beyond saturate. Symmetric only.
        step_rms: distance of two levels in units of the root mean square, instead of from the largest magnitude:
            uniform steps for the entropy coder. Axis tensor and symmetric only.
    """

    levels: int = Levels
    axis: Axis = "token"
    group_tokens: int = Field(default=32, ge=1, le=65535)
    symmetric: bool = True
    clip: float = Field(default=1.0, gt=0.0, le=1.0)
    step_rms: float | None = Field(default=None, gt=0.0, le=16.0)

    @model_validator(mode="after")
    def _check(self) -> "Quantiser":
        if self.step_rms is not None and (self.axis != "tensor" or not self.symmetric):
            raise ValueError("step_rms is for the symmetric tensor axis")
        if self.clip != 1.0 and not self.symmetric:
            raise ValueError("clip is for symmetric levels")
        return self


class PipelineSpec(ConfigModel):
    """One pipeline. Everything but `kind` matters to kind `quantised` only; `zstd_level` to lossless too.

    Library files leave out what has its default: another default would change what they mean.

    Attributes:
        keep_ratio: part of the prompt's tokens that is handed over at all (`token_selection`); below 1 the transfer
            begins when the whole prompt is computed. With every kind.
        keep_sinks, keep_recent: first and last tokens that are kept whatever their score.
        kind: raw; byte planes and zstd; 8-bit floats; all stages.
        sink_tokens, tail_tokens: the first and the last tokens of the prompt that stay raw.
        rope_theta: base of the model's rotary embedding (rotated halves, all channels), to undo it in K for the wire; a
            wrong one costs ratio, nothing else. None: leave it.
        center_k, center_v: subtract the mean of each channel over the frame.
        rotate_k, rotate_v, seed: random Hadamard transform over head_dim.
        k, v: the levels of most planes; a plane is one (layer, K or V, head).
        recent_tokens, k_recent, v_recent: that many last tokens of the prompt, before the raw tail, have levels of
            their own, in all planes; None: as the others'.
        protected_first, protected_last: that many first and last layers of the model use the protected levels.
        k_protected_levels, v_protected_levels: None: as the others. Likewise k_protected_step_rms ...
        k_plane_steps, v_plane_steps: factors on the steps of planes, [layer][head] of the whole model; empty: none.
            The encoder's own: on the wire a plane's step is its scale.
        low_heads: (layer, head) pairs, global numbers, that use the low levels; a protected layer has none.
        k_low_levels, v_low_levels: None: as the others. Likewise k_low_step_rms ...
        entropy, zstd_level: what is done with the packed digits and the scales.
    """

    keep_ratio: float = Field(default=1.0, gt=0.0, le=1.0)
    keep_sinks: int = Field(default=4, ge=0, le=4096)
    keep_recent: int = Field(default=32, ge=0, le=65536)
    kind: Literal["none", "lossless", "fp8", "quantised"] = "quantised"
    sink_tokens: int = Field(default=0, ge=0, le=4096)
    tail_tokens: int = Field(default=0, ge=0, le=4096)
    rope_theta: float | None = Field(default=None, gt=1.0, le=1e12)
    center_k: bool = True
    center_v: bool = False
    rotate_k: bool = True
    rotate_v: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    k: Quantiser = Quantiser(levels=16)
    v: Quantiser = Quantiser(levels=16)
    recent_tokens: int = Field(default=0, ge=0, le=65536)
    k_recent: Quantiser | None = None
    v_recent: Quantiser | None = None
    protected_first: int = Field(default=0, ge=0, le=1024)
    protected_last: int = Field(default=0, ge=0, le=1024)
    k_protected_levels: int | None = Field(default=None, ge=2, le=256)
    v_protected_levels: int | None = Field(default=None, ge=2, le=256)
    k_protected_step_rms: float | None = Field(default=None, gt=0.0, le=16.0)
    v_protected_step_rms: float | None = Field(default=None, gt=0.0, le=16.0)
    k_plane_steps: tuple[tuple[PlaneStep, ...], ...] = ()
    v_plane_steps: tuple[tuple[PlaneStep, ...], ...] = ()
    low_heads: tuple[tuple[int, int], ...] = ()
    k_low_levels: int | None = Field(default=None, ge=2, le=256)
    v_low_levels: int | None = Field(default=None, ge=2, le=256)
    k_low_step_rms: float | None = Field(default=None, gt=0.0, le=16.0)
    v_low_step_rms: float | None = Field(default=None, gt=0.0, le=16.0)
    entropy: Literal["none", "zstd"] = "zstd"
    zstd_level: int = Field(default=1, ge=1, le=19)

    @model_validator(mode="after")
    def _check(self) -> "PipelineSpec":
        if any(layer < 0 or head < 0 for layer, head in self.low_heads):
            raise ValueError("low_heads are pairs of layer and head, from 0")
        for quantiser, steps in (
            (self.k, (self.k_protected_step_rms, self.k_low_step_rms)),
            (self.v, (self.v_protected_step_rms, self.v_low_step_rms)),
        ):
            if quantiser.step_rms is None and any(step is not None for step in steps):
                raise ValueError("a class may have its own step_rms where the others have one")
        return self

    @property
    def is_lossless(self) -> bool:
        return self.kind in ("none", "lossless") and self.keep_ratio == 1.0

    @property
    def selection(self) -> TokenSelection | None:
        """Which tokens are handed over; None: all."""
        if self.keep_ratio == 1.0:
            return None
        return TokenSelection(self.keep_ratio, self.keep_sinks, self.keep_recent)
