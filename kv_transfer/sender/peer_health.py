"""When to try a peer again that could not be reached: after 1 s, then 2, 4, ... up to 60.

Whoever reaches the peer forgets its record: the next failure begins at the first step.
"""


class PeerHealth:
    """Memory of one peer's failures. Pure but for that; not thread-safe.

    Everything that fails before the next try is due belongs to the outage that is known already: many transfers that
    die with one peer count as one failure.
    """

    def __init__(self, first_retry_s: float = 1.0, max_retry_s: float = 60.0) -> None:
        if not 0 < first_retry_s <= max_retry_s:
            raise ValueError("first_retry_s must be in (0, max_retry_s]")
        self._first_retry_s = first_retry_s
        self._max_retry_s = max_retry_s
        self._wait_s = 0.0  # 0: healthy
        self._retry_at = 0.0

    @property
    def is_healthy(self) -> bool:
        return self._wait_s == 0.0

    def may_try(self, now: float) -> bool:
        """Tell whether a connection may be attempted: always to a healthy peer, else when the next try is due. Pure."""
        return self.retry_after_s(now) == 0.0

    def retry_after_s(self, now: float) -> float:
        """Return how long to wait before the next try; 0 when it is due. Pure."""
        return 0.0 if self.is_healthy else max(0.0, self._retry_at - now)

    def failed(self, now: float) -> None:
        """The peer could not be reached, or its link broke."""
        if not self.may_try(now):
            return
        self._wait_s = min(self._wait_s * 2 or self._first_retry_s, self._max_retry_s)
        self._retry_at = now + self._wait_s
