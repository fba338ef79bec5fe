"""The configuration as the compiled search reads it."""

import numpy as np

from router.routing.columns import SETTINGS
from router.routing.config import RoutingConfig, Term
from router.routing.modes import Mode


def settings_of(config: RoutingConfig) -> np.ndarray:
    """Return a record (`columns.SETTINGS`) [1]; the bounds of the links are filled in per decision."""
    ignored = config.ignored_terms
    settings = np.zeros(1, SETTINGS)
    values: dict[str, float | int | bool] = {
        "weigh_queue": float(Term.QUEUE not in ignored),
        "weigh_prefill": float(Term.PREFILL not in ignored),
        "weigh_transfer": float(Term.TRANSFER not in ignored),
        "weigh_decode": float(Term.DECODE not in ignored),
        "crowding_weight": 0.0 if Term.CROWDING in ignored else config.crowding_weight,
        "use_hot": Term.HOT not in ignored,
        "use_forecast": Term.FORECAST not in ignored,
        "allow_remote": Mode.REMOTE_PREFILL in config.modes,
        "allow_local": Mode.LOCAL_PREFILL in config.modes,
        "allow_colocated": Mode.COLOCATED in config.modes,
        "late_binding": config.late_binding,
        "late_patience_s": config.late_patience_s,
        "candidates_per_role": config.candidates_per_role,
        "local_max_tokens": config.local_prefill_max_tokens,
        "local_min_held_ratio": config.local_prefill_min_held_ratio,
        "stall_weight": config.stall_weight,
        "colocated_slowdown": config.colocated_slowdown,
        "handicap_ratio": config.colocation_handicap_ratio,
        "host_tier_bytes_per_s": config.host_tier_bytes_per_s,
        "slo_weight": config.slo_weight,
        "affinity_s": config.affinity_credit_s,
        "submit_slack_s": config.submit_slack_s,
        "stale_after_s": config.stale_after_s,
        "bucket_s": config.forecast_bucket_s,
        "tail_ratio": config.links.tail_ratio,
        "link_forget_s": config.links.forget_s,
    }
    for name, value in values.items():
        settings[name] = value
    return settings
