"""Which compression profiles a prefill worker may use: finds the library of its model, and opens the chooser.

Who calls what: the desk, once, when the model is loaded.
"""

import logging
from pathlib import Path

from prometheus_client import CollectorRegistry

from core.clock import Clock
from core.layout import KvLayout
from kv_transfer.codecs.ladder import ladder
from kv_transfer.config import KvTransferConfig
from kv_transfer.controller.chooser import Chooser
from kv_transfer.controller.opening import open_chooser
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


def open_profiles(
    config: KvTransferConfig,
    model_path: Path,
    layout: KvLayout,
    clock: Clock,
    *,
    seed: int,
    registry: CollectorRegistry,
) -> Chooser:
    """Return the chooser of one worker.

    Raises:
        ConfigError: as `profiles_for`; or `transfer.policy` names a profile that there is not.
    """
    return open_chooser(config, profiles_for(config, model_path, layout), clock, seed=seed, registry=registry)
