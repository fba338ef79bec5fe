"""Token ids to text where tokens are pieces of bytes: every token is looked at once. Pure; knows no tokenizer.

Two ways of writing bytes: byte-level tokens are bytes of UTF-8 and nothing else; with byte fallback a token is text, or
one byte of a character that the vocabulary lacks.
"""

import codecs
from collections.abc import Mapping, Sequence

_REPLACEMENT = "\ufffd"
_MAX_HELD_BYTES = 16  # a character has at most 4, so many more are not one character


class Utf8Detokenizer:
    """Of byte-level tokens: the text is what UTF-8 makes of their bytes, broken ones replaced as soon as they are.

    A character that the prompt left open is the answer's when its last byte is.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], prompt_tail: Sequence[int] = ()) -> None:
        """`token_bytes`: empty for tokens without text."""
        self._token_bytes = token_bytes
        self._reader = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False  # the reader has the beginning of a character
        self.push(prompt_tail)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids, return the text that became certain (perhaps empty)."""
        token_bytes = self._token_bytes
        pieces = b"".join([token_bytes[one] for one in token_ids])
        if not self._is_open:
            try:
                return pieces.decode()  # mostly whole characters: several times as fast
            except UnicodeDecodeError:
                pass  # the reader can tell what is broken from what is not there yet
        text = self._reader.decode(pieces)
        self._is_open = bool(self._reader.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what is left, broken characters included. Call once, at the end."""
        return self._reader.decode(b"", True)


class FallbackDetokenizer:
    """Of tokens with byte fallback: a run of byte tokens that is no UTF-8 comes out as a replacement for each byte."""

    def __init__(self, pieces: Mapping[int, str | int], num_stripped: int, prompt_tail: Sequence[int] = ()) -> None:
        """
        Args:
            pieces: of each token its text, empty for one without, or its byte.
            num_stripped: so many spaces at the very beginning of the prompt's and the answer's text are left out.
        """
        self._pieces = pieces
        self._num_stripped = num_stripped
        self._run = bytearray()
        self.push(prompt_tail)
        # The tail may begin inside of a character; what counts is only whether it ends inside of one.
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        reader.decode(self._run)
        self._run = bytearray(reader.getstate()[0])

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids, return the text that became certain (perhaps empty)."""
        texts: list[str] = []
        for one in token_ids:
            piece = self._pieces[one]
            if isinstance(piece, int):
                self._run.append(piece)
                texts.append(self._characters())
            elif piece:
                if self._run:
                    texts.append(self.flush())
                texts.append(piece)
        text = "".join(texts)
        return self._stripped(text) if self._num_stripped else text

    def flush(self) -> str:
        """Return what is left: a replacement for each byte. Call once, at the end."""
        text = _REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _characters(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            return self.flush() if len(self._run) >= _MAX_HELD_BYTES else ""
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        rest = text.lstrip(" ")
        num_spaces = len(text) - len(rest)
        if num_spaces > self._num_stripped:
            rest = text[self._num_stripped :]
        self._num_stripped = 0 if rest else self._num_stripped - num_spaces
        return rest
