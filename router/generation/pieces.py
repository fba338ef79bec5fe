"""What every surface reads an answer through, whatever its pieces are."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

P = TypeVar("P", covariant=True)


class Pieces(Protocol[P]):
    """An answer: `Answer`, or a `ChatAnswer` of one."""

    @property
    def is_over(self) -> bool: ...

    async def take(self) -> Sequence[P]: ...

    def abandon(self, reason: str) -> None: ...
