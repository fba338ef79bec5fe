"""Estimates: the model's predictions for arms in a place, corrected by what experience says of each.

This is the hot part of a decision: plain floats, one object per arm, keys made once per kind of place.
"""

import math
from collections.abc import Sequence

from kv_transfer.controller.arms import Arm
from kv_transfer.controller.bandit import PRIOR_VARIANCES, Cause, Experience, Key
from kv_transfer.controller.decisions import Candidate
from kv_transfer.controller.model import MIN_EXPOSED_S, Prediction, predict, sensitivity
from kv_transfer.controller.policy import Place

_MACHINE = Key("machine")
_MAX_REMEMBERED = 1024
_MAX_CODEC_DOUBT = 1.0 - math.exp(-math.sqrt(PRIOR_VARIANCES["codec"]))


class Estimate:
    """One arm in one place.

    Attributes:
        codec_factor, wire_factor, ratio_factor, residual: that experience puts on the model's stages, on the profile's
            ratio, and on the exposed time without the wait in the queue, which is no profile's doing.
        total_s, exposed_s: after all of them.
        price_s, score_s: of crowding, and with it; set by the policy.
        wire_key, codec_key, rest_key: whose beliefs these are.
    """

    __slots__ = (
        "arm",
        "codec_factor",
        "codec_key",
        "exposed_s",
        "price_s",
        "ratio_factor",
        "residual",
        "rest_key",
        "score_s",
        "times",
        "total_s",
        "wire_factor",
        "wire_key",
    )

    arm: Arm
    times: Prediction
    codec_factor: float
    wire_factor: float
    ratio_factor: float
    residual: float
    exposed_s: float
    total_s: float
    price_s: float
    score_s: float
    wire_key: Key
    codec_key: Key
    rest_key: Key

    def candidate(self, doubt: float) -> Candidate:
        """Return the terms as they are told."""
        times = self.times
        return Candidate(
            self.arm.name,
            times.total_s,
            self.total_s,
            self.price_s,
            times.encode_s,
            times.wire_s,
            times.decode_s,
            doubt,
            self.codec_factor,
            self.wire_factor / self.ratio_factor,
            self.residual,
            times.is_hidden,
        )


class Estimator:
    """Experience, asked about arms in places."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._keys: dict[tuple[tuple[Arm, ...], str, int, int], list[Key]] = {}

    def estimates(self, arms: tuple[Arm, ...], where: Place, now: float) -> list[Estimate]:
        """Return one estimate per arm, in order. Changes nothing."""
        place_key = (arms, where.link_class, where.goodput_class, where.size_bucket)
        keys = self._keys.get(place_key)
        if keys is None:
            if len(self._keys) >= _MAX_REMEMBERED:
                self._keys.clear()
            keys = self._keys[place_key] = _keys(arms, where)
        exp, at = math.exp, where.situation
        compute_s = at.compute_s
        believed = iter(self._experience.means(keys, now))
        machine, wire = next(believed), next(believed)
        if where.is_prior:  # the mean time, not the time at the mean: a link may be slower by far more than faster
            wire += self._experience.believe(keys[1], now)[1] / 2
        wire_factor = exp(wire)
        estimates, wire_key, at_key = [], keys[1], 2
        for arm, codec, ratio, rest in zip(arms, believed, believed, believed, strict=True):
            codec_factor = exp(machine + codec) if arm.loss_rank else 1.0
            ratio_factor = exp(ratio) if ratio else 1.0
            times = predict(arm, at, codec_factor, wire_factor, ratio_factor)
            estimate = Estimate()  # filled here: a call per arm is a tenth of a decision
            residual = exp(rest) if rest else 1.0
            own = times.total_s - compute_s - times.waited_s
            exposed = times.waited_s + (own if own > MIN_EXPOSED_S else MIN_EXPOSED_S) * residual
            estimate.arm, estimate.times = arm, times
            estimate.codec_factor, estimate.residual = codec_factor, residual
            estimate.wire_factor, estimate.ratio_factor = wire_factor, ratio_factor
            estimate.exposed_s = exposed
            estimate.total_s = estimate.score_s = compute_s + exposed
            estimate.price_s = 0.0
            estimate.wire_key, estimate.codec_key, estimate.rest_key = wire_key, keys[at_key], keys[at_key + 2]
            at_key += 3
            estimates.append(estimate)
        return estimates

    def codec_doubt_s(self, estimate: Estimate, at_least_s: float, where: Place, now: float) -> float:
        """Return by how much the arm would be faster if its codec were one standard deviation faster. Changes nothing.

        To first order, and as if all of the codec's time were exposed: who is told apart here is only looked at. What
        cannot be `at_least_s` is 0: most arms are not worth the look-up.
        """
        times = estimate.times
        codec_s = min(estimate.exposed_s, (times.encode_s + times.decode_s) / where.situation.codec_threads)
        if codec_s * _MAX_CODEC_DOUBT < at_least_s:
            return 0.0
        variance = self._experience.believe(estimate.codec_key, now)[1]
        return codec_s * (1.0 - math.exp(-math.sqrt(variance)))

    def causes(self, estimate: Estimate, where: Place) -> list[Cause]:
        """Return what the arm's exposed time depends on, and how much; the wire is the second."""
        arm = estimate.arm
        times, factors = estimate.times, (estimate.codec_factor, estimate.wire_factor, estimate.ratio_factor)
        depends = sensitivity(arm, where.situation, *factors, times)
        own_part = 1.0 - times.waited_s / estimate.exposed_s
        causes = [Cause(estimate.rest_key, own_part), Cause(estimate.wire_key, depends.wire)]
        if arm.loss_rank:
            causes.append(Cause(_MACHINE, depends.codec))
            causes.append(Cause(estimate.codec_key, depends.codec))
        return causes


def ratio_key(arm: Arm, where: Place) -> Key:
    """Return whose belief the achieved ratio is. Pure."""
    return Key("ratio", "", arm.name, 0, where.size_bucket)


def _rest_key(arm: Arm, where: Place) -> Key:
    return Key("rest", where.link_class, arm.name, where.goodput_class, where.size_bucket)


def _wire_key(where: Place) -> Key:
    return Key("guess" if where.is_prior else "wire", where.link_class)


def _keys(arms: Sequence[Arm], where: Place) -> list[Key]:
    keys = [_MACHINE, _wire_key(where)]
    for arm in arms:
        keys += (Key("codec", "", arm.name), ratio_key(arm, where), _rest_key(arm, where))
    return keys
