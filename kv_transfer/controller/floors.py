"""Which arms a quality floor allows; `core.kv_quality` says what floors are."""

from collections.abc import Sequence

from kv_transfer.controller.arms import Arm

_MAX_REMEMBERED = 256


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
