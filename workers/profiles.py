"""Which compression profiles hold for a worker's model, and getting ready to use them.

Both kinds of worker find the library when the model is loaded: the prefill worker chooses from it, the decode worker
only gets ready for what may come. What it is sent describes itself.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError
from core.layout import KvLayout
from kv_transfer.codecs.ladder import ladder
from kv_transfer.codecs.warming import warm_up
from kv_transfer.config import KvTransferConfig
from kv_transfer.profile import CodecTime, Profile, ProfileRefused, find_library

_log = logging.getLogger(__name__)

# Exact by construction, so it needs no validation. What it brings and costs is a cautious guess, which the controller
# corrects by what it sees.
UNMEASURED_LOSSLESS = Profile(
    name="lossless",
    pipeline=ladder()["lossless"],
    ratio=1.2,
    encode=CodecTime(fixed_s=1e-3, s_per_byte=3e-9),
    decode=CodecTime(fixed_s=1e-3, s_per_byte=2e-9),
    origin="first guess: no library",
)


def profiles_for(config: KvTransferConfig, model_path: Path, layout: KvLayout) -> tuple[Profile, ...]:
    """Return what transfers of this model may use. Without a library: what is exact whatever the model.

    Raises:
        ConfigError: the library that was named is none, or was not validated for this model; the message says why.
    """
    if config.profiles == "none":
        return ()
    library = find_library(config.profiles, model_path)
    if library is None:
        _log.info("no library of compression profiles next to %s: KV is transferred raw or lossless", model_path)
        return (UNMEASURED_LOSSLESS,)
    try:
        found = library.validated(layout)
    except ProfileRefused as refused:
        if config.profiles != "auto":
            raise
        _log.warning("KV is transferred raw or lossless: %s", refused)
        return (UNMEASURED_LOSSLESS,)
    _log.info("compression profiles of %s: %s", library.model, ", ".join(profile.name for profile in found))
    return found


def without_scores(profiles: Sequence[Profile], policy: str) -> tuple[Profile, ...]:
    """Return the profiles that hand every token over: what is left when the engine keeps no scores of tokens.

    Raises:
        ConfigError: `policy` names one that does not.
    """
    kept = tuple(profile for profile in profiles if profile.pipeline.selection is None)
    for profile in profiles:
        if profile in kept:
            continue
        detail = (
            f"profile {profile.name} leaves tokens out by their scores, which are not kept: set engine.score_window"
        )
        if profile.name == policy:
            raise ConfigError(f"transfer.policy: {detail}; a model with a sliding window has none")
        _log.warning("%s", detail)
    return kept


def get_ready(profiles: Sequence[Profile], layout: KvLayout) -> None:
    """Compile what these profiles need. Blocking; takes seconds on a machine that never did it before."""
    warm_up([profile.pipeline for profile in profiles], layout)
