"""The prompts that are computed, or will be, without a decode worker yet: bounded, and served in the order they came.

Without a bound every request would leave the queue at once while the decode pool is full, and wait as KV in the prefill
pool, where neither classes nor tenants have an order.
"""

from core.ids import RequestId
from router.in_flight import ActiveRequest
from router.lifecycle import RequestState

_SEEKING = (RequestState.SEEKING, RequestState.HOLDING)


class LateBound:
    """In the order in which they began."""

    def __init__(self, max_prompts: int) -> None:
        self._max_prompts = max_prompts
        self._prompts: dict[RequestId, ActiveRequest] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def has_room(self) -> bool:
        return len(self._prompts) < self._max_prompts

    def add(self, active: ActiveRequest) -> None:
        self._prompts[active.request_id] = active

    def discard(self, active: ActiveRequest) -> None:
        """It has a decode worker, or needs none any more."""
        self._prompts.pop(active.request_id, None)

    def first(self) -> ActiveRequest | None:
        """Return the oldest one that has nobody to ask now: when something was freed it asks first."""
        return next((active for active in self._prompts.values() if active.machine.state in _SEEKING), None)
