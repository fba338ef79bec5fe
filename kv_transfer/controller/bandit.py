"""What experience says about the model's predictions: factors that stretch them, each with its doubt.

Four kinds of causes can make a transfer slower than predicted, and each has a belief about the logarithm of a factor:

- `codec` of an arm, and `machine`, of all arms: codecs here are not as fast as where they were measured;
- `wire` of a link class: the link's time per byte is not 1 / goodput; `guess` while the goodput itself is a guess;
- `rest` of (link class, goodput class, size bucket, arm): the residual rho = T_obs / T_hat that none of these explains.

One number is observed per transfer. What it says beyond the prediction is shared out among the causes by how doubtful
each is and how much of the time depends on it: the update of a Kalman filter. So a codec that turns out slow on a fast
link is known to be slow on a slow link too, and `none` teaches about the wire. The fifth kind, `ratio` of (arm, size
bucket), is observed directly: what a profile really leaves on the wire. Beliefs relax to "as the model says" with
a time constant, and their doubt grows back: experience ages.

A change of bandwidth is the goodput's to follow, not experience's: what is compared is the model's prediction with the
goodput at the end of the transfer; a change on the way makes the observation worth less; and a surprise beyond a factor
of `SURPRISE`, and beyond what was doubted, counts only when the next transfer of that kind confirms it.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple


class Key(NamedTuple):
    """Whose belief: the kind, and what it is about. What a kind does not depend on stays empty."""

    kind: str
    link_class: str = ""
    arm: str = ""
    goodput_class: int = 0
    size_bucket: int = 0


PRIOR_VARIANCES = {
    "codec": 0.45**2,
    "machine": 0.35**2,
    "wire": 0.15**2,
    "guess": 1.5**2,  # like wire, of links whose goodput is a prior
    "rest": 0.15**2,
    "ratio": 0.1**2,
}
NOISE_VARIANCE = 0.12**2  # of one observed transfer, as a part of its time
SURPRISE = math.log(3.0)
_MAX_DEVIATIONS = 3.0  # an observation further off than that counts as if it were this far


class Belief(NamedTuple):
    """Mean and variance of the logarithm of a factor, as of a time."""

    mean: float
    variance: float
    at_s: float


class Cause(NamedTuple):
    """One suspect: whose belief, and the change of the log of the exposed time per change of the log of its factor."""

    key: Key
    sensitivity: float


class Experience:
    """Beliefs by key, least recently used first. Bounded in number and in age. No clock of its own."""

    def __init__(self, *, knowledge_s: float, max_contexts: int, context_ttl_s: float) -> None:
        self._knowledge_s = knowledge_s
        self._max_contexts = max_contexts
        self._context_ttl_s = context_ttl_s
        self._beliefs: OrderedDict[Key, Belief] = OrderedDict()
        self._surprises: dict[str, float] = {}
        self.version = 0

    def believe(self, key: Key, now: float) -> tuple[float, float]:
        """Return mean and variance of a factor's logarithm at `now`. Changes nothing."""
        belief = self._beliefs.get(key)
        if belief is None:
            return 0.0, PRIOR_VARIANCES[key.kind]
        mean, variance, at_s = belief
        age_s = now - at_s
        if age_s < 1.0:  # not worth an exponential
            return mean, variance
        left = math.exp(-age_s / self._knowledge_s)
        prior = PRIOR_VARIANCES[key.kind]
        return mean * left, prior + (variance - prior) * left * left

    def means(self, keys: Iterable[Key], now: float) -> list[float]:
        """Return the means of many factors' logarithms at `now`: what a decision asks most. Changes nothing."""
        get = self._beliefs.get
        found = []
        for key in keys:
            belief = get(key)
            if belief is None:
                found.append(0.0)
                continue
            mean, _, at_s = belief
            age_s = now - at_s
            found.append(mean if age_s < 1.0 else mean * math.exp(-age_s / self._knowledge_s))
        return found

    def learn(
        self, link_class: str, log_ratio: float, noise_variance: float, causes: Iterable[Cause], now: float
    ) -> bool:
        """Share an observation out among its causes. Returns False when it was too surprising to be believed alone.

        Args:
            link_class: where it was seen; surprises are confirmed per class.
            log_ratio: observed over predicted exposed time; the prediction with all factors as believed at `now`.
            noise_variance: of `log_ratio`, of what is no cause's fault.
        """
        suspects = [(cause, *self.believe(cause.key, now)) for cause in causes if cause.sensitivity > 0.0]
        total = noise_variance + sum(cause.sensitivity**2 * variance for cause, _, variance in suspects)
        limit = _MAX_DEVIATIONS * math.sqrt(total)
        if abs(log_ratio) > max(SURPRISE, limit):
            last = self._surprises.get(link_class, 0.0)
            self._surprises[link_class] = log_ratio
            if last * log_ratio <= 0.0:
                return False
        else:
            self._surprises.pop(link_class, None)
        innovation = min(limit, max(-limit, log_ratio))
        for cause, mean, variance in suspects:
            gain = variance * cause.sensitivity / total
            self._store(cause.key, Belief(mean + gain * innovation, variance * (1.0 - gain * cause.sensitivity), now))
        return True

    def learn_directly(self, key: Key, log_factor: float, noise_variance: float, now: float) -> None:
        """Take note of a factor that was itself observed."""
        mean, variance = self.believe(key, now)
        gain = variance / (variance + noise_variance)
        self._store(key, Belief(mean + gain * (log_factor - mean), variance * (1.0 - gain), now))

    def evict(self, now: float) -> None:
        """Forget what has had no news for too long."""
        while self._beliefs:
            key, belief = next(iter(self._beliefs.items()))
            if now - belief.at_s <= self._context_ttl_s:
                return
            del self._beliefs[key]

    def beliefs(self) -> list[tuple[Key, Belief]]:
        """Return all, least recently used first."""
        return list(self._beliefs.items())

    def restore(self, beliefs: Iterable[tuple[Key, Belief]]) -> None:
        """Replace everything; in the order of `beliefs()`."""
        self._beliefs.clear()
        self._surprises.clear()
        for key, belief in beliefs:
            self._store(key, belief)

    def __len__(self) -> int:
        return len(self._beliefs)

    def _store(self, key: Key, belief: Belief) -> None:
        self.version += 1
        self._beliefs[key] = belief
        self._beliefs.move_to_end(key)
        if len(self._beliefs) > self._max_contexts:
            self._beliefs.popitem(last=False)
