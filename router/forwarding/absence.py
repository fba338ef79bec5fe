"""Since when nobody can be asked at all: requests wait a little for the first workers, then fail. Pure."""

from collections.abc import Mapping

from core.errors import NoWorkers
from core.membership import Role


class WorkerAbsence:
    """The caller owns the time.

    Args:
        is_alone_allowed: one worker may serve a request by itself, so one pool is enough.
    """

    def __init__(self, *, is_alone_allowed: bool, patience_s: float, now: float) -> None:
        self._is_alone_allowed = is_alone_allowed
        self._patience_s = patience_s
        self._since: float | None = now

    def can_serve(self, live: Mapping[Role, int]) -> bool:
        """Somebody can be asked: a worker of each role, or any at all when one may do it alone."""
        return all(live.values()) or (self._is_alone_allowed and any(live.values()))

    def note(self, live: Mapping[Role, int], now: float) -> None:
        """So many workers of each role are there now."""
        if self.can_serve(live):
            self._since = None
        elif self._since is None:
            self._since = now

    def deadline(self) -> float | None:
        """When it has lasted too long; None while somebody can be asked."""
        return None if self._since is None else self._since + self._patience_s

    def has_lasted(self, now: float) -> bool:
        deadline = self.deadline()
        return deadline is not None and now >= deadline


def missing(live: Mapping[Role, int]) -> NoWorkers:
    """Return the error that names who is missing."""
    return NoWorkers(" and ".join(f"no live {role} worker" for role, count in live.items() if not count))
