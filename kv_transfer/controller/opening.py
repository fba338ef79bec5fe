"""From configuration and profiles to a chooser: the one place where the controller's parts are composed."""

import random
from collections.abc import Sequence

from prometheus_client import REGISTRY, CollectorRegistry

from core.clock import Clock
from kv_transfer.codecs.pipeline import open_encoder
from kv_transfer.config import KvTransferConfig
from kv_transfer.controller.arms import arms_of
from kv_transfer.controller.chooser import Chooser
from kv_transfer.controller.controller import ControllerPolicy
from kv_transfer.controller.metrics import ControllerMetrics
from kv_transfer.controller.policy import Pipeline, Policy
from kv_transfer.controller.static_policy import StaticPolicy
from kv_transfer.profile import Profile

CONTROLLER = "controller"


def open_chooser(
    config: KvTransferConfig,
    profiles: Sequence[Profile],
    clock: Clock,
    *,
    seed: int = 0,
    registry: CollectorRegistry | None = None,
) -> Chooser:
    """Return the chooser of one prefill worker.

    Args:
        profiles: of the model, validated; none at all means that every transfer goes as it is.
        seed: of the draws by which profiles are tried.
        registry: that the metrics are registered in, once; the process's default one.

    Raises:
        ConfigError: `config.policy` names a profile that there is not.
    """
    arms = arms_of(profiles, open_encoder)
    pipeline = Pipeline(
        config.frames_per_transfer, config.min_frame_raw_bytes, config.max_frame_raw_bytes, config.codec_threads
    )
    policy: Policy
    if config.policy == CONTROLLER:
        policy = ControllerPolicy(arms, config.controller, pipeline, random.Random(seed))
    else:
        policy = StaticPolicy(arms, config.policy, config.controller, pipeline)
    metrics = ControllerMetrics(REGISTRY if registry is None else registry)
    return Chooser(policy, clock, metrics, config.controller.max_decisions)
