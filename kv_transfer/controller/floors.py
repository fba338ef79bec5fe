"""Quality floors: words for numbers, and which arms a floor allows."""

from collections.abc import Sequence

from kv_transfer.choice import EXACT
from kv_transfer.controller.arms import Arm

FLOORS = {"exact": EXACT, "high": 0.99, "balanced": 0.97}
_MAX_REMEMBERED = 256


def quality_floor(value: str | float) -> float:
    """Return the floor that a word or a number means, in [0, 1]. Pure.

    Raises:
        ValueError: neither.
    """
    if isinstance(value, str) and value in FLOORS:
        return FLOORS[value]
    try:
        floor = float(value)
    except ValueError:
        floor = -1.0
    if not 0.0 <= floor <= 1.0:  # also what is not a number
        raise ValueError(f"{value!r} is neither {', '.join(FLOORS)} nor a number between 0 and 1")
    return floor


class FloorFilter:
    """The arms that each floor allows. A cluster uses a handful of floors, so the answers are remembered."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._arms = tuple(arms)
        self._allowed: dict[float, tuple[Arm, ...]] = {}

    def allowed(self, floor: float) -> tuple[Arm, ...]:
        """Return those whose agreement, at the lower bound, is not below `floor`; `none` is always among them."""
        known = self._allowed.get(floor)
        if known is None:
            if len(self._allowed) >= _MAX_REMEMBERED:
                self._allowed.clear()
            known = self._allowed[floor] = tuple(arm for arm in self._arms if arm.meets(floor))
        return known
