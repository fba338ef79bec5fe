"""How good KV must still be when it arrives: the words that requests and configurations use, and the numbers they mean.

A floor is the least token agreement, at its lower confidence bound, of the compression profile that a transfer may use;
1 means that what arrives is equal bit for bit.
"""

from typing import Annotated, Literal

from pydantic import Field

EXACT = 1.0
FLOORS = {"exact": EXACT, "high": 0.99, "balanced": 0.97}

KvQuality = Literal["exact", "high", "balanced"] | Annotated[float, Field(ge=0, le=1)]
"""Of a configuration key."""


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
