"""How long a prompt waited and was computed, as its machine hears of it."""

from core.ids import RequestId
from workers.messages import SendComputed


class PromptTimes:
    """Of one request. Times are the clock's seconds."""

    def __init__(self, accepted_at: float) -> None:
        self.is_computed = False
        self._accepted_at = accepted_at
        self._scheduled_at = accepted_at
        self._cached_tokens = 0

    def scheduled(self, now: float, cached_tokens: int) -> None:
        """It got into the batch; so much of it needs no computing."""
        self._scheduled_at, self._cached_tokens = now, cached_tokens

    def computed(self, request_id: RequestId, now: float, cause: str) -> SendComputed:
        """The first token is there."""
        self.is_computed = True
        return SendComputed(
            request_id,
            queue_s=self._scheduled_at - self._accepted_at,
            compute_s=now - self._scheduled_at,
            cached_tokens=self._cached_tokens,
            cause=cause,
        )
