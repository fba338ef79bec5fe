"""Token ids to text, a piece at a time, and stop strings across piece borders. Pure; knows no tokenizer.

A byte-level tokenizer may split one character over several tokens, so text is released only when it decodes to whole
characters; and when stop strings are asked for, text that could be the beginning of one is held back until it is known.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

Decode = Callable[[Sequence[int]], str]
PROMPT_TAIL_TOKENS = 8  # enough for a tokenizer to know what the first new token follows
_REPLACEMENT = "�"
_MAX_HELD_IDS = 16  # without text of their own; a character has at most 4 bytes, so many more are not one character
_MAX_OPEN_IDS = 3  # at the end may be the beginning of a character


class Detokenizer(Protocol):
    """The text of a growing list of ids."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids, return the text that became certain (perhaps empty)."""

    def flush(self) -> str:
        """Return what is left, broken characters included. Call once, at the end."""


NewDetokenizer = Callable[[Sequence[int]], Detokenizer]  # for the ids that follow a prompt which ends with these


class IncrementalDetokenizer:
    """Decodes a growing list of ids without decoding it from the start each time. For tokenizers of which nothing is
    known but how they decode; `core.byte_text` has faster ways for the usual ones.

    Two offsets into the ids: text up to `_read` was emitted; decoding starts at `_prefix`, a few ids earlier, because
    tokenizers may add or drop a leading space depending on the id before. Source: the scheme of Hugging Face's
    text-generation-inference.

    Ids that give no whole character are held back, but not many: broken bytes come out as replacement characters.
    """

    def __init__(self, decode: Decode, prompt_tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt_tail)
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids, return the text that became certain (perhaps empty)."""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return self._give_up(before, after) if len(self._ids) - self._read > _MAX_HELD_IDS else ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _give_up(self, before: str, after: str) -> str:
        """Let go of ids that have been held for long, so that what is decoded per piece stays bounded."""
        if after == before:
            del self._ids[self._read :]  # silent, as special tokens are; the ids before stay, as context
            return ""
        for num_open in range(_MAX_OPEN_IDS, 0, -1):
            end = len(self._ids) - num_open
            head = self._decode(self._ids[self._prefix : end])
            if len(head) >= len(before) and after.startswith(head):  # not cut inside of a character
                self._prefix, self._read = self._read, end
                return head[len(before) :]
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Return what is left, broken characters included. Call once, at the end."""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        return after[len(before) :]


class StopScanner:
    """Finds the first stop string in a stream of text pieces, holding back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._inner = frozenset("".join(stop[:-1] for stop in stops))  # what ends with another letter begins no stop
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Add text; return what may be shown. After a match everything further is swallowed.

        The earliest match wins; among matches at one place, the first listed.
        """
        if self.matched is not None:
            return ""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        found = [(at, order) for order, stop in enumerate(self._stops) if (at := text.find(stop)) >= 0]
        if found:
            at, order = min(found)
            self.matched = self._stops[order]
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops) if text[-1] in self._inner else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return held-back text; call once, when the stream ended without a match."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (shorter than `stop` itself)."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
