"""When things happened to one request, and the split of its time that clients and metrics are given. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimingSplit:
    """Seconds. queue + route + prefill = ttft."""

    queue_s: float
    route_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float
    total_s: float


class Timeline:
    """Marks of one request, in the clock's seconds. A retry moves the marks of dispatch and acceptance forward."""

    def __init__(self, arrived_at: float) -> None:
        self.arrived_at = arrived_at
        self.first_token_at: float | None = None
        self._dispatched_at = arrived_at
        self._accepted_at = arrived_at
        self._last_token_at = arrived_at

    def dispatched(self, now: float) -> None:
        """It left the queue for the router."""
        self._dispatched_at = self._accepted_at = now

    def accepted(self, now: float) -> None:
        """All workers that it needs now have accepted."""
        self._accepted_at = now

    def tokens_arrived(self, now: float) -> None:
        if self.first_token_at is None:
            self.first_token_at = now
        self._last_token_at = now

    def split(self, num_tokens: int, now: float) -> TimingSplit:
        """Return the split; meaningful once the first token arrived."""
        first_at = now if self.first_token_at is None else self.first_token_at
        tpot_s = (self._last_token_at - first_at) / (num_tokens - 1) if num_tokens > 1 else 0.0
        return TimingSplit(
            queue_s=self._dispatched_at - self.arrived_at,
            route_s=self._accepted_at - self._dispatched_at,
            prefill_s=first_at - self._accepted_at,
            ttft_s=first_at - self.arrived_at,
            tpot_s=tpot_s,
            total_s=now - self.arrived_at,
        )
