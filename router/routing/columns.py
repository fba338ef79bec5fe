"""The arrays that the policy computes on: one row per worker slot, and the records that go into and out of a search.

The types are structured, so that compiled code knows the layout by the type: a change here compiles it anew. Times are
seconds, counts are floats (they are averaged, discounted and compared, never used as indices).
"""

from enum import IntEnum

import numpy as np

FORECAST_BUCKETS = 16
LINK_CLASSES = 4
FLOOR_CLASSES = 4


class RoleCode(IntEnum):
    """Role of a row; NONE: the slot is empty."""

    NONE = 0
    PREFILL = 1
    DECODE = 2


class ModeCode(IntEnum):
    """`router.routing.modes.Mode` in arrays."""

    REMOTE_PREFILL = 0
    LOCAL_PREFILL = 1
    COLOCATED = 2


class LinkClass(IntEnum):
    """How near two workers are."""

    HOST = 0
    RACK = 1
    ZONE = 2
    FAR = 3


_CREDIT = ["requests", "prefill_tokens", "context_tokens", "prefill_s"]

WORKER = np.dtype(
    [
        # Facts of the record.
        ("role", np.int64),
        ("is_live", np.bool_),
        ("breaker_open", np.bool_),
        ("hash_key", np.int64),  # code of how its prefix cache is keyed
        ("layout", np.int64),  # code of the KV layout: equal codes can exchange KV
        ("block_size", np.float64),
        ("max_model_len", np.float64),  # 0: not known
        ("kv_bytes_per_token", np.float64),
        ("host", np.int64),  # codes of the topology; 0: not known
        ("rack", np.int64),
        ("zone", np.int64),
        # The last load report, and when it came.
        ("heard_at", np.float64),
        ("reported_at", np.float64),
        ("queued_tokens", np.float64),
        ("requests", np.float64),  # all that it holds
        ("prompts", np.float64),  # of those, to be computed: one behind the other
        ("running", np.float64),  # in the batch, or waiting for it with their KV
        ("context_tokens", np.float64),
        ("reserved", np.float64),  # accepted, KV not landed
        ("reserved_tokens", np.float64),
        ("free_blocks", np.float64),
        ("total_blocks", np.float64),
        # Sent by this gateway, and not in that report; the same of other gateways.
        *[(f"credit_{name}", np.float64) for name in _CREDIT],
        *[(f"peer_{name}", np.float64) for name in _CREDIT],
        # Of what is reserved: sent by this gateway, and so known by its time (`joins`).
        ("own_reserved", np.float64),
        ("own_reserved_tokens", np.float64),
        # Expected to be in the batch by now, and not in the report.
        ("due_requests", np.float64),
        ("due_tokens", np.float64),
        # What the machine does: seconds = a + b*u + c*u*(h + u/2); step = c0 + c1*requests + c2*context tokens.
        ("prefill_a", np.float64),
        ("prefill_b", np.float64),
        ("prefill_c", np.float64),
        ("s_per_token", np.float64),  # of an average prompt's uncached tokens: what a queued token stands for
        ("decode_c0", np.float64),
        ("decode_c1", np.float64),
        ("decode_c2", np.float64),
        ("mean_steps", np.float64),  # that a running request has left
        ("prefill_seen_at", np.float64),  # when the worker last told about these; -inf: never
        ("decode_seen_at", np.float64),
    ],
    align=True,
)

LINK = np.dtype(
    [
        ("key", np.int64),  # of the pair; 0: the place is free
        ("goodput", np.float64),  # bytes/s
        ("rtt_s", np.float64),
        ("queued_bytes", np.float64),  # that waited for the link at `seen_at`
        ("seen_at", np.float64),
    ]
)

LINK_CLASS = np.dtype(
    [
        ("goodput", np.float64),
        ("rtt_s", np.float64),
        ("residual", np.float64, (FLOOR_CLASSES,)),  # exposed seconds, seen over predicted
        ("ratio", np.float64, (FLOOR_CLASSES,)),  # raw bytes over bytes on the wire
    ]
)

QUERY = np.dtype(
    [
        ("now", np.float64),
        ("prompt_tokens", np.float64),
        ("reusable_tokens", np.float64),  # of the prompt, at most: the last token is computed, to sample the first
        ("max_total_tokens", np.float64),
        ("needs_decode", np.bool_),
        ("allow_late", np.bool_),
        ("steps", np.float64),
        ("waited_s", np.float64),
        ("slo_ttft_s", np.float64),  # inf: no target
        ("slo_tpot_s", np.float64),
        ("slo_deadline_s", np.float64),
        ("hot_tokens", np.float64),
        ("hot_reuses", np.float64),
        ("floor", np.int64),  # class of the quality floor
        ("fixed_prefill", np.int64),  # slots; -1: open
        ("fixed_decode", np.int64),
        ("session_prefill", np.int64),
        ("session_decode", np.int64),
        ("remaining_prefill_s", np.float64),  # of the fixed prefill worker
        ("seed", np.uint64),
    ],
    align=True,
)

SETTINGS = np.dtype(
    [
        ("weigh_queue", np.float64),
        ("weigh_prefill", np.float64),
        ("weigh_transfer", np.float64),
        ("weigh_decode", np.float64),
        ("crowding_weight", np.float64),
        ("use_hot", np.bool_),
        ("use_forecast", np.bool_),
        ("allow_remote", np.bool_),
        ("allow_local", np.bool_),
        ("allow_colocated", np.bool_),
        ("late_binding", np.bool_),
        ("late_patience_s", np.float64),
        ("candidates_per_role", np.int64),
        ("local_max_tokens", np.float64),
        ("local_min_held_ratio", np.float64),
        ("stall_weight", np.float64),
        ("colocated_slowdown", np.float64),
        ("handicap_ratio", np.float64),
        ("host_tier_bytes_per_s", np.float64),
        ("slo_weight", np.float64),
        ("affinity_s", np.float64),
        ("submit_slack_s", np.float64),
        ("stale_after_s", np.float64),
        ("bucket_s", np.float64),
        ("tail_ratio", np.float64),
        ("link_forget_s", np.float64),
        ("best_bytes_per_s", np.float64),  # of KV, before compression; no link is better: bounds of the search
        ("least_rtt_s", np.float64),
        ("least_residual", np.float64),
    ],
    align=True,
)

SIDE = np.dtype(
    [
        # Of one worker, if it computes the prompt.
        ("queue_s", np.float64),
        ("compute_s", np.float64),  # of what it does not hold
        ("charged_s", np.float64),  # of that, less the discount on a hot prefix
        ("crowding_s", np.float64),  # what that takes from those behind it
        ("load_s", np.float64),  # host tier to device
        ("ready_s", np.float64),  # from now to the first token
        ("ttft_slo_s", np.float64),
        ("uncached_tokens", np.float64),
        ("held_tokens", np.float64),
        ("prompt_cost_s", np.float64),
        # If it decodes.
        ("steps_s", np.float64),
        ("tpot_s", np.float64),
        ("room_s", np.float64),  # wait for blocks
        ("tpot_slo_s", np.float64),
        ("decode_held_tokens", np.float64),
        ("raw_bytes", np.float64),  # of KV that it does not hold
        ("decode_cost_s", np.float64),
        ("affinity_s", np.float64),  # in whichever cost it is counted
    ],
    align=True,
)

TERM_NAMES = (
    "queue_s",
    "prefill_s",
    "crowding_s",
    "host_tier_s",
    "transfer_s",
    "decode_s",
    "slo_s",
    "affinity_s",
    "handicap_s",
)

CANDIDATE = np.dtype(
    [
        ("total_s", np.float64),
        *[(name, np.float64) for name in TERM_NAMES],
        ("ttft_s", np.float64),
        ("tpot_s", np.float64),
        ("transfer_total_s", np.float64),
        ("room_s", np.float64),  # wait for blocks where it decodes
        ("ready_in_s", np.float64),
        ("compute_s", np.float64),
        ("uncached_tokens", np.float64),
        ("held_tokens", np.float64),
        ("decode_held_tokens", np.float64),
        ("mode", np.int64),
        ("prefill", np.int64),  # slots; -1: none
        ("decode", np.int64),
    ],
    align=True,
)

FOUND = np.dtype(
    [
        ("num_candidates", np.int64),
        ("num_prefill", np.int64),  # workers that could be asked
        ("num_decode", np.int64),
        ("is_late", np.bool_),
        ("has_prefill_pool", np.bool_),
        ("has_decode_pool", np.bool_),
        ("prefill_obstacles", np.int64),  # bits by `OBSTACLE_BITS`
        ("decode_obstacles", np.int64),
        ("next_prefill_s", np.float64),  # total of the best placement whose prompt is computed elsewhere; inf: none
        ("next_decode_s", np.float64),
        ("prefill_slack_s", np.float64),  # how much busier than thought; see `decision.Decision`
        ("decode_slack_s", np.float64),
        ("is_tie", np.bool_),  # the second is as cheap as the first
        ("has_longest_prefix", np.bool_),  # the first holds more of the prompt than any that computes it elsewhere
        ("max_queued_tokens", np.int64),  # -1: none
        ("max_requests_held", np.int64),
    ],
    align=True,
)
