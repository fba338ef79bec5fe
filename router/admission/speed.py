"""How fast the queue empties: prompt tokens that the cluster accepted, per second in which it could not take all. Pure.

Only time under backlog counts. An idle minute says nothing about how fast a full queue would empty, and what was
accepted into an idle cluster at once says nothing either.
"""

from collections import deque
from dataclasses import dataclass

_NUM_SLICES = 20
_MIN_BUSY_RATIO = 0.05  # of the window; less time under backlog is no measurement


@dataclass(slots=True)
class _Slice:
    begins_at: float
    busy_s: float = 0.0
    num_tokens: int = 0


class QueueSpeed:
    """A sliding window over the time of one process.

    Args:
        window_s: what is older counts no more.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._slices: deque[_Slice] = deque()
        self._seen_until: float | None = None

    @property
    def num_slices(self) -> int:
        return len(self._slices)

    def pass_time(self, now: float, *, is_backlogged: bool) -> None:
        """Tell in which state the queue was since the last call. Time does not run backwards."""
        since = self._seen_until
        self._seen_until = now
        if is_backlogged and since is not None and now > since:
            self._slice(now).busy_s += min(now - since, self._window_s)
        while self._slices and self._slices[0].begins_at <= now - self._window_s:
            self._slices.popleft()

    def accepted(self, num_tokens: int, now: float) -> None:
        """So many were accepted under backlog."""
        self._slice(now).num_tokens += num_tokens

    def wait_s(self, num_tokens: int) -> float | None:
        """Return how long so many tokens take to leave, None while that is not known.

        When nothing was accepted lately it is at least so long as that has lasted.
        """
        busy_s = sum(piece.busy_s for piece in self._slices)
        accepted = sum(piece.num_tokens for piece in self._slices)
        if busy_s < _MIN_BUSY_RATIO * self._window_s:
            return None
        return busy_s * num_tokens / accepted if accepted else busy_s

    def _slice(self, now: float) -> _Slice:
        length_s = self._window_s / _NUM_SLICES
        if not self._slices or now - self._slices[-1].begins_at >= length_s:
            self._slices.append(_Slice(now))
        return self._slices[-1]
