"""The bounds of the queue, in requests, tokens and bytes, with a part of each kept for every service class.

What a class does not use of its part is nobody else's: however many people wait, a batch request finds a place, grows
old in it and is served. Without that, strict bands would starve a class at the door instead of in the queue.
"""

from core.service_class import ServiceClass
from router.admission.claims import Amount

_NOTHING = Amount()


class Room:
    """What is held of the bounds, by class.

    Args:
        reserved_ratio: part of each bound that is kept for each class, rounded down.
    """

    def __init__(self, bounds: Amount, reserved_ratio: float) -> None:
        self._bounds = bounds
        self._reserved = Amount(
            int(bounds.num_requests * reserved_ratio),
            int(bounds.num_tokens * reserved_ratio),
            int(bounds.num_bytes * reserved_ratio),
        )
        self._held = dict.fromkeys(ServiceClass, _NOTHING)
        self._total = _NOTHING

    @property
    def held(self) -> Amount:
        return self._total

    def held_by(self, service_class: ServiceClass) -> Amount:
        return self._held[service_class]

    def copy(self) -> "Room":
        """Return one to try things with."""
        other = Room(self._bounds, 0.0)
        other._reserved, other._held, other._total = self._reserved, dict(self._held), self._total
        return other

    def add(self, service_class: ServiceClass, amount: Amount) -> None:
        self._held[service_class] = self._held[service_class].plus(amount)
        self._total = self._total.plus(amount)

    def remove(self, service_class: ServiceClass, amount: Amount) -> None:
        self._held[service_class] = self._held[service_class].minus(amount)
        self._total = self._total.minus(amount)

    def lack(self, service_class: ServiceClass, amount: Amount) -> str:
        """Return the bound that has no place for one more of the class, or "". One of any size fits an empty queue."""
        if self._total.num_requests == 0:
            return ""
        used = self._used_against(service_class).plus(amount)
        if used.num_requests > self._bounds.num_requests:
            return f"{self._bounds.num_requests} requests"
        if used.num_tokens > self._bounds.num_tokens:
            return f"{self._bounds.num_tokens} tokens"
        if used.num_bytes > self._bounds.num_bytes:
            return f"{self._bounds.num_bytes} bytes"
        return ""

    def gives_way(self, service_class: ServiceClass) -> bool:
        """The class holds more than its part of some bound: sending one of it away makes room for others."""
        held, kept = self._held[service_class], self._reserved
        return (
            held.num_requests > kept.num_requests
            or held.num_tokens > kept.num_tokens
            or held.num_bytes > kept.num_bytes
        )

    def _used_against(self, service_class: ServiceClass) -> Amount:
        """What counts as taken: all that is held, and what other classes have not used of their parts."""
        used, kept = self._total, self._reserved
        for other, held in self._held.items():
            if other is not service_class:
                used = used.plus(
                    Amount(
                        max(0, kept.num_requests - held.num_requests),
                        max(0, kept.num_tokens - held.num_tokens),
                        max(0, kept.num_bytes - held.num_bytes),
                    )
                )
        return used
