"""Where workers are, as small numbers, and how near two of them are."""

from router.routing.columns import FLOOR_CLASSES, LinkClass


class Codes:
    """Names as numbers from 1 on; 0 is the empty name. Grows with the number of different names only."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {"": 0}

    def of(self, name: str) -> int:
        return self._codes.setdefault(name, len(self._codes))


_FLOORS = (1.0, 0.99, 0.97)


def floor_class(quality_floor: float) -> int:
    """Return which quality floors share what is learned of compression: exact, high, balanced, anything. Pure."""
    for position, floor in enumerate(_FLOORS):
        if quality_floor >= floor:
            return position
    return FLOOR_CLASSES - 1


def link_class(one: tuple[int, int, int], other: tuple[int, int, int]) -> LinkClass:
    """Return how near two (host, rack, zone) are; places that nobody told are far apart. Pure."""
    for kind, mine, its in zip((LinkClass.HOST, LinkClass.RACK, LinkClass.ZONE), one, other, strict=True):
        if mine != 0 and mine == its:
            return kind
    return LinkClass.FAR
