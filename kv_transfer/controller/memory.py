"""Experience as bytes: versioned JSON, small, with ages instead of times, since no clock outlives its process.

A snapshot holds for the profiles that it was made with: where their measurements differ, so does what their residuals
mean. It is read as if no time had passed since it was made; what is stale wears off, as all experience does.
"""

import json
import logging
import math
from collections.abc import Iterable

import xxhash

from kv_transfer.controller.arms import Arm
from kv_transfer.controller.bandit import PRIOR_VARIANCES, Belief, Experience, Key

VERSION = 1
MAX_SNAPSHOT_BYTES = 4 * 1024 * 1024
_MAX_MEAN = math.log(1000.0)  # a factor beyond that is damage, not experience

_log = logging.getLogger(__name__)


def fingerprint(arms: Iterable[Arm]) -> str:
    """Return what snapshots of these arms have in common: names, ratios and codec times. Pure."""
    told = [
        (
            arm.name,
            arm.ratio,
            arm.encode_fixed_s,
            arm.encode_s_per_byte,
            arm.decode_fixed_s,
            arm.decode_s_per_byte,
        )
        for arm in arms
    ]
    return xxhash.xxh64_hexdigest(json.dumps(told).encode())


def snapshot(experience: Experience, arms: Iterable[Arm], now: float) -> bytes:
    """Return everything that is known. Pure."""
    rows = [
        [*key, round(belief.mean, 5), float(f"{belief.variance:.4g}"), round(now - belief.at_s, 1)]
        for key, belief in experience.beliefs()
    ]
    data = {"version": VERSION, "arms": fingerprint(arms), "beliefs": rows}
    return json.dumps(data, separators=(",", ":")).encode()


def restore(data: bytes, experience: Experience, arms: Iterable[Arm], now: float) -> bool:
    """Replace what is known by a snapshot. Returns False, with a line in the log, when it is not one of these arms."""
    try:
        beliefs = _read(data, fingerprint(arms), now)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        _log.warning("the controller starts without experience: %s", error)
        return False
    experience.restore(beliefs)
    experience.evict(now)
    return True


def _read(data: bytes, expected: str, now: float) -> list[tuple[Key, Belief]]:
    if len(data) > MAX_SNAPSHOT_BYTES:
        raise ValueError(f"a snapshot of {len(data)} bytes is none of ours")
    parsed = json.loads(data)
    if not isinstance(parsed, dict) or parsed.get("version") != VERSION:
        raise ValueError(f"the snapshot is not of version {VERSION}")
    if parsed["arms"] != expected:
        raise ValueError("the snapshot was made with other profiles")
    return [_row(row, now) for row in parsed["beliefs"]]


def _row(row: list[object], now: float) -> tuple[Key, Belief]:
    kind, link_class, arm, goodput_class, size_bucket, mean, variance, age_s = row
    texts_fit = isinstance(kind, str) and kind in PRIOR_VARIANCES and isinstance(link_class, str)
    if not (texts_fit and isinstance(arm, str) and isinstance(goodput_class, int) and isinstance(size_bucket, int)):
        raise ValueError(f"the snapshot has a row that is not a belief: {str(row)[:80]}")
    mean, variance, age_s = _number(mean), _number(variance), _number(age_s)
    assert isinstance(kind, str)
    if abs(mean) > _MAX_MEAN or not 0.0 < variance <= PRIOR_VARIANCES[kind] * 1.001 or age_s < 0.0:
        raise ValueError(f"the snapshot has a belief out of range: {str(row)[:80]}")
    return Key(kind, str(link_class), arm, goodput_class, size_bucket), Belief(mean, variance, now - age_s)


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is not a number")
    return float(value)
