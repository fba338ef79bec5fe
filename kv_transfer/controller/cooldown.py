"""Cooldowns: a profile that keeps missing budgets or failing on a kind of link rests for a while."""

from collections import deque

from kv_transfer.session import NackReason

WINDOW = 10
BLAMED_ON_PROFILES = frozenset(
    {NackReason.MALFORMED, NackReason.CHECKSUM, NackReason.LENGTH, NackReason.CODEC, NackReason.POOL}
)
"""Failures that another profile might have been spared. A lost link or a cancelled request is nobody's fault."""


class Cooldowns:
    """Per (link class, profile): the last outcomes, and until when it rests. Times are arguments."""

    def __init__(self, *, misses: int, duration_s: float) -> None:
        self._misses = misses
        self._duration_s = duration_s
        self._outcomes: dict[tuple[str, str], deque[bool]] = {}
        self._until: dict[tuple[str, str], float] = {}

    def ended(self, link_class: str, profile: str, *, is_miss: bool, now: float) -> None:
        """Note an outcome. One too many and the rest begins; afterwards the profile starts with a clean sheet."""
        outcomes = self._outcomes.setdefault((link_class, profile), deque(maxlen=WINDOW))
        outcomes.append(is_miss)
        if sum(outcomes) >= self._misses:
            self._until[link_class, profile] = now + self._duration_s
            outcomes.clear()

    def resting(self, link_class: str, now: float) -> frozenset[str]:
        """Return the profiles that are not to be used now."""
        if not self._until:
            return frozenset()
        for key in [key for key, until in self._until.items() if until <= now]:
            del self._until[key]
        return frozenset(profile for where, profile in self._until if where == link_class)
