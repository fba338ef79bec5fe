"""Everything that is wrong with a request, found in one go: a client that mends one field should not meet the next."""

import contextlib
from collections.abc import Iterator

from core.errors import InvalidRequest


class Violations:
    """Collects; `check` raises what was found.

    Use: `with found.collecting(): check_this()`, or `found.add(field, problem)`; in the end `found.check()`.
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, field: str, problem: str) -> None:
        self._found.append((field, problem))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep what is raised inside, if it is about fields, and go on behind the block."""
        try:
            yield
        except InvalidRequest as error:
            self._found.extend(error.violations)

    def check(self) -> None:
        """Raises: InvalidRequest, with all that was found; nothing was: returns."""
        if self._found:
            (field, problem), *others = self._found
            raise InvalidRequest(field, problem, others=tuple(others))
