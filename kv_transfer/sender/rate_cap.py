"""A cap on the rate of one link, for tests and for polite background traffic: a token bucket without a clock."""


class RateCap:
    """Says how long a message must wait. Pure but for its memory; not thread-safe.

    The bucket is kept as the time at which everything that was admitted is paid for. A message is paid before it
    leaves, so a capped link delivers like a wire of that rate; an idle link saves up at most `burst_bytes`.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: int = 64 * 1024) -> None:
        self._check(bytes_per_s)
        if burst_bytes < 0:
            raise ValueError("burst_bytes must not be negative")
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._paid_at: float | None = None

    @property
    def bytes_per_s(self) -> float:
        return self._bytes_per_s

    def delay_s(self, now: float, num_bytes: int) -> float:
        """Admit a message of `num_bytes` and return how long it must wait, >= 0. Messages are admitted in order."""
        earliest = now - self._burst_bytes / self._bytes_per_s
        begins = earliest if self._paid_at is None else max(self._paid_at, earliest)
        self._paid_at = begins + num_bytes / self._bytes_per_s
        return max(0.0, self._paid_at - now)

    def withdraw(self, num_bytes: int) -> None:
        """Take back the message that was admitted last: it did not leave."""
        if self._paid_at is not None:
            self._paid_at -= num_bytes / self._bytes_per_s

    def change(self, now: float, bytes_per_s: float) -> None:
        """Cap at another rate from now on; what is owed is owed in bytes."""
        self._check(bytes_per_s)
        if self._paid_at is not None:
            self._paid_at = now + (self._paid_at - now) * self._bytes_per_s / bytes_per_s
        self._bytes_per_s = bytes_per_s

    @staticmethod
    def _check(bytes_per_s: float) -> None:
        if not bytes_per_s > 0:
            raise ValueError("a rate cap must be more than 0 bytes per second")
