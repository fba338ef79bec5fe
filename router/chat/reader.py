"""Text that arrives in pieces, for parsers that are written as if it were all there.

A parser is a generator: it yields whenever it must know more than has arrived, and it decides only by what later text
cannot change. So it gives the same however the text was cut.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Parsing = Generator[None, None, T]  # yields when it needs more text
Take = Callable[[str], None]

_NOT_SPACE = re.compile(r"\S")
_SCALAR_END = re.compile(r"[\s,:;\]}]")
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_STRUCTURE = re.compile(r'["\\]')
_PYTHON_STRUCTURE = re.compile(r"""["'(){}\[\],]""")
_PYTHON_STRING_STRUCTURE = re.compile(r"""["'\\]""")


class TooLong(Exception):
    """More came than is kept."""


class Reader:
    """The text not yet taken, and whether more may come.

    Its parsing methods take what they recognise and leave the rest.

    Attributes:
        has_ended: the text was over before a method knew what it wanted to know.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._anchor: int | None = None
        self._is_last = False
        self.has_ended = False

    def feed(self, text: str, is_last: bool) -> None:
        """Add text; drop what was taken and will not be given back."""
        done = self._at if self._anchor is None else self._anchor
        self._text = self._text[done:] + text
        self._at -= done
        if self._anchor is not None:
            self._anchor = 0
        self._is_last = is_last

    def anchor(self) -> None:
        """Keep what is taken from here on, until it is given back or let go."""
        self._anchor = self._at

    def let_go(self) -> None:
        self._anchor = None

    def give_back(self) -> str:
        """Return what was taken since the anchor, as it was written; empty without one."""
        if self._anchor is None:
            return ""
        text = self._text[self._anchor : self._at]
        self._anchor = None
        return text

    def peek(self) -> Parsing[str]:
        """Return the next character, empty at the end."""
        while self._at == len(self._text):
            if self._is_last:
                self.has_ended = True
                return ""
            yield
        return self._text[self._at]

    def space(self) -> Parsing[str]:
        """Take white space, all that comes."""
        parts = ""
        while True:
            found = _NOT_SPACE.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            parts += self._text[self._at : end]
            self._at = end
            if found or self._is_last:
                return parts
            yield

    def literal(self, *texts: str) -> Parsing[str]:
        """Take one of these texts, the first listed that is there. If none is, empty; then nothing is taken, but for
        the beginning of one where the text ends."""
        while True:
            could_be = False
            for text in texts:
                if self._text.startswith(text, self._at):
                    if not could_be or self._is_last:  # nothing listed before can still come
                        self._at += len(text)
                        return text
                elif text.startswith(self._text[self._at :]):
                    could_be = True
            if not could_be:
                return ""
            if self._is_last:
                self.has_ended = True
                self._at = len(self._text)
                return ""
            yield

    def ahead(self, *texts: str) -> Parsing[str]:
        """Return what `literal` would take."""
        found = yield from self.literal(*texts)
        self._at -= len(found)
        return found

    def until(self, marks: Sequence[str], take: Take, take_cut: Take | None = None) -> Parsing[str]:
        """Take text up to the first of `marks`, which is left out and returned; empty when the text ended before.

        Args:
            marks: none may hold another.
            take_cut: takes the beginning of a mark, where the text ended with one; by default `take` does.
        """
        while True:
            places = [(place, mark) for mark in marks if (place := self._text.find(mark, self._at)) >= 0]
            if places:
                place, mark = min(places)
                self._pass_on(place, take)
                self._at += len(mark)
                return mark
            held = max(_overlap(self._text, self._at, mark) for mark in marks)
            self._pass_on(len(self._text) - held, take)
            if self._is_last:
                self._pass_on(len(self._text), take_cut or take)
                self.has_ended = True
                return ""
            yield

    def rest(self, take: Take) -> Parsing[None]:
        """Take all that comes."""
        while True:
            self._pass_on(len(self._text), take)
            if self._is_last:
                return
            yield

    def word(self, pattern: re.Pattern[str]) -> Parsing[str]:
        """Take what `pattern` matches here; it matches the empty text, and every beginning of what it matches."""
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None
            if found.end() < len(self._text) or self._is_last:
                self.has_ended = self.has_ended or found.end() == len(self._text)
                self._at = found.end()
                return found[0]
            yield

    def json_string(self, max_characters: int | None = None) -> Parsing[str | None]:
        """Take a JSON string and return what it says; None when there is none, or no whole one, or it is too long."""
        if (yield from self.peek()) != '"':
            return None
        parts: list[str] = []
        try:
            take = parts.append if max_characters is None else at_most(max_characters, parts.append)
            if not (yield from self.json_value(take)):
                return None
            return str(json.loads("".join(parts), strict=False))
        except (TooLong, ValueError):
            return None

    def json_value(self, take: Take) -> Parsing[bool]:
        """Take a JSON value, passing on its text as it comes; return whether it is whole.

        Only brackets and quotes are looked at: what is wrong inside is passed on as it is.
        """
        first = yield from self.peek()
        if first not in '"{[':
            return (yield from self._scalar(take))
        depth, in_string = 0, False
        while True:
            at, is_over = self._at, False
            while not is_over:
                found = (_STRING_STRUCTURE if in_string else _STRUCTURE).search(self._text, at)
                if found is None:
                    at = len(self._text)
                    break
                character, at = found[0], found.end()
                if character == "\\":
                    if at == len(self._text):
                        at -= 1  # what it escapes is not there yet
                        break
                    at += 1
                elif character == '"':
                    in_string = not in_string
                elif character in "{[":
                    depth += 1
                else:
                    depth -= 1
                is_over = depth == 0 and not in_string
            self._pass_on(at, take)
            if is_over:
                return True
            if self._is_last:
                self._pass_on(len(self._text), take)
                self.has_ended = True
                return False
            yield

    def python_value(self, take: Take) -> Parsing[str]:
        """Take a Python expression up to the comma or bracket after it, which is left out and returned; empty when the
        text ended before."""
        depth, quote = 0, ""
        while True:
            at, mark = self._at, ""
            while not mark:
                found = (_PYTHON_STRING_STRUCTURE if quote else _PYTHON_STRUCTURE).search(self._text, at)
                if found is None:
                    at = len(self._text)
                    break
                character, at = found[0], found.end()
                if quote and character == "\\":
                    if at == len(self._text):
                        at -= 1  # what it escapes is not there yet
                        break
                    at += 1
                elif quote:
                    quote = "" if character == quote else quote
                elif character in "'\"":
                    quote = character
                elif character in "([{":
                    depth += 1
                elif depth == 0 and character in ",)":
                    mark = character
                elif character in ")]}":
                    depth = max(0, depth - 1)
            self._pass_on(at - len(mark), take)
            if mark:
                self._at = at
                return mark
            if self._is_last:
                self._pass_on(len(self._text), take)
                self.has_ended = True
                return ""
            yield

    def _scalar(self, take: Take) -> Parsing[bool]:
        is_empty = True
        while True:
            found = _SCALAR_END.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            is_empty = is_empty and end == self._at
            self._pass_on(end, take)
            if found or self._is_last:
                self.has_ended = self.has_ended or found is None
                return found is not None and not is_empty
            yield

    def _pass_on(self, end: int, take: Take) -> None:
        if end > self._at:
            take(self._text[self._at : end])
            self._at = end


def ignore(_: str) -> None:
    """Take nothing of it."""


def at_most(num_characters: int, take: Take) -> Take:
    """Return what takes so many characters and raises TooLong at the next."""
    room = num_characters

    def bounded(text: str) -> None:
        nonlocal room
        room -= len(text)
        if room < 0:
            raise TooLong
        take(text)

    return bounded


def _overlap(text: str, start: int, mark: str) -> int:
    """Length of the longest end of `text`, from `start` on, that begins `mark`."""
    for size in range(min(len(text) - start, len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
