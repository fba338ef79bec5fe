"""The prompts that are computed, or will be, without a decode worker yet: bounded, and served in the order they came.

Without a bound every request would leave the queue at once while the decode pool is full, and wait as KV in the prefill
pool, where neither classes nor tenants have an order.
"""

from core.ids import RequestId
from router.in_flight import ActiveRequest
from router.lifecycle import RequestState

_SEEKING = (RequestState.SEEKING, RequestState.HOLDING)


class LateBound:
    """In the order in which they began.

    Nobody asks twice for the same reason: after `note_room` the oldest asks, and the next one only when that found a
    place, or there is room again. Each has a timer of its own besides.
    """

    def __init__(self, max_prompts: int) -> None:
        self._max_prompts = max_prompts
        self._prompts: dict[RequestId, ActiveRequest] = {}
        self._may_ask = False

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

    def note_room(self) -> None:
        """Something was freed, or found: there may be room now."""
        self._may_ask = True

    def take_turn(self) -> ActiveRequest | None:
        """Return who is to ask for the room that was noted, if any was: the oldest one that asks nobody now."""
        if not self._may_ask:
            return None
        self._may_ask = False
        return next((active for active in self._prompts.values() if active.machine.state in _SEEKING), None)
