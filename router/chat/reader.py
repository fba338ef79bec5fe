"""Text that arrives in pieces, for parsers that are written as if it were all there.

A parser is a generator: it yields whenever it needs to know more than has arrived, and it decides only on what later
text cannot change. So it gives the same however the text was cut.
"""

from collections.abc import Generator

Waiting = Generator[None, None, None]


class Reader:
    """The text not yet taken, and whether more may come."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self.is_last = False

    def feed(self, text: str, is_last: bool) -> None:
        """Add text; drop what was taken."""
        if text or self._at:
            self._text = self._text[self._at :] + text
            self._at = 0
        self.is_last = is_last
