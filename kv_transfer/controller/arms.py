"""Arms: profiles as the controller sees them, numbers only, in order of loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import ConfigError
from core.kv_quality import EXACT
from kv_transfer.codec import RAW, Encoder
from kv_transfer.codecs.spec import PipelineSpec
from kv_transfer.profile import NONE, Profile
from kv_transfer.token_selection import TokenSelection


@dataclass(frozen=True, slots=True, eq=False)  # itself only: hashed in every decision
class Arm:
    """One profile.

    Attributes:
        ratio: raw bytes over bytes on the wire.
        encode_fixed_s, encode_s_per_byte, decode_fixed_s, decode_s_per_byte: per frame, per raw byte, on one core.
        agreement_low: lower confidence bound of the token agreement; 1 for lossless profiles.
        selection: which tokens it hands over; None: all.
        loss_rank: 0 for `none`, then lossless, then by falling agreement.
    """

    name: str
    encoder: Encoder
    ratio: float
    encode_fixed_s: float
    encode_s_per_byte: float
    decode_fixed_s: float
    decode_s_per_byte: float
    agreement_low: float
    is_lossless: bool
    loss_rank: int
    selection: TokenSelection | None = None

    def meets(self, quality_floor: float) -> bool:
        """Tell whether a request with this floor may use it; a floor of 1 is exactness. Pure."""
        return self.is_lossless or (quality_floor < EXACT and self.agreement_low >= quality_floor)


def arms_of(profiles: Sequence[Profile], open_encoder: Callable[[PipelineSpec], Encoder]) -> tuple[Arm, ...]:
    """Return the arms of a library, least lossy first; `none` is always the first of them.

    Raises:
        ConfigError: two profiles share a name.
    """
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise ConfigError(f"profiles: two have one name: {', '.join(sorted(names))}")
    none = next((profile for profile in profiles if profile.name == NONE), None)
    others = [profile for profile in profiles if profile.name != NONE]
    others.sort(key=lambda profile: (not profile.is_lossless, -_agreement_low(profile), profile.ratio))
    first = Arm(NONE, RAW, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, is_lossless=True, loss_rank=0)
    if none is not None:
        first = _arm(none, RAW, 0)
    return (first, *(_arm(profile, open_encoder(profile.pipeline), rank) for rank, profile in enumerate(others, 1)))


def _arm(profile: Profile, encoder: Encoder, loss_rank: int) -> Arm:
    encode, decode = profile.encode, profile.decode
    return Arm(
        profile.name,
        encoder,
        profile.ratio,
        encode.fixed_s,
        encode.s_per_byte,
        decode.fixed_s,
        decode.s_per_byte,
        _agreement_low(profile),
        profile.is_lossless,
        loss_rank,
        profile.pipeline.selection,
    )


def _agreement_low(profile: Profile) -> float:
    if profile.is_lossless:
        return 1.0
    assert profile.quality is not None, "a lossy profile states its quality"
    return profile.quality.agreement_low
