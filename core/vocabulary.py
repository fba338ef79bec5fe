"""A checkpoint's tokenizer.json: text to ids, ids to text, and what single tokens are. Gateway and engine both read
text out of ids by it, so that a stop string is found by both at the same place.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from core.byte_text import FallbackDetokenizer, Utf8Detokenizer
from core.errors import ConfigError
from core.text import Detokenizer, IncrementalDetokenizer

T = TypeVar("T")
_SPACE = "\u2581"  # of vocabularies that came from sentencepiece


class Vocabulary:
    """The tokens of one checkpoint.

    Concurrency: all methods may be called from several threads. Encoding goes to the library's core directly: wrappers
    around it change its truncation on every call, which breaks when two threads encode at once.
    """

    def __init__(self, core: Tokenizer) -> None:
        """Takes ownership of `core`."""
        core.no_truncation()
        core.no_padding()
        self._core = core
        added = core.get_added_tokens_decoder()
        self.special_tokens = {token.content: one for one, token in added.items() if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self._texts: dict[int, str] = _Remembered(lambda one: self.token_bytes(one).decode("utf-8", "replace"))
        self._make: Callable[[Sequence[int]], Detokenizer]
        decoder = json.loads(core.decoder.__getstate__()) if core.decoder is not None else {}
        if _is_byte_level(decoder):
            self._bytes: dict[int, bytes] = _Remembered(self._byte_level)
            shown = _Remembered(lambda one: b"" if one in self._special_ids else self._bytes[one])
            self._make = lambda prompt_tail: Utf8Detokenizer(shown, prompt_tail)
        elif (num_stripped := _stripped_by_fallback(decoder)) is not None:
            self._bytes = _Remembered(self._with_fallback)
            pieces = _Remembered(self._piece)
            self._make = lambda prompt_tail: FallbackDetokenizer(pieces, num_stripped, prompt_tail)
        else:
            self._bytes = _Remembered(lambda one: str(core.decode([one], skip_special_tokens=False)).encode())
            self._make = lambda prompt_tail: IncrementalDetokenizer(self.decode, prompt_tail)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read a tokenizer.json. Takes up to seconds.

        Raises:
            ConfigError: there is none, or it is broken.
        """
        if not path.is_file():
            raise ConfigError(f"model path {path.parent}: cannot load the tokenizer: there is no tokenizer.json")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises no narrower one
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"model path {path.parent}: cannot load the tokenizer: {line}") from error

    def encode(self, text: str, *, with_markers: bool) -> list[int]:
        """Return the ids of a text; `with_markers`: and those that the tokenizer puts around a plain prompt."""
        return list(self._core.encode(text, add_special_tokens=with_markers).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self._core.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self, prompt_tail: Sequence[int] = ()) -> Detokenizer:
        """Return one for the ids that follow a prompt which ends with these."""
        return self._make(prompt_tail)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token is in UTF-8, special tokens spelled out; not always whole characters. Remembered."""
        return self._bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether texts leave this token out."""
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """Return `token_bytes` as text, U+FFFD for broken characters. Remembered."""
        return self._texts[token_id]

    def _byte_level(self, token_id: int) -> bytes:
        token = self._core.id_to_token(token_id) or ""
        try:
            return bytes([_BYTE_OF[character] for character in token])
        except KeyError:  # not written in the alphabet of bytes, as added tokens are not
            return token.encode()

    def _with_fallback(self, token_id: int) -> bytes:
        piece = self._piece_or_special(token_id)
        return bytes([piece]) if isinstance(piece, int) else piece.encode()

    def _piece(self, token_id: int) -> str | int:
        return "" if token_id in self._special_ids else self._piece_or_special(token_id)

    def _piece_or_special(self, token_id: int) -> str | int:
        token = self._core.id_to_token(token_id) or ""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                return token
        return token.replace(_SPACE, " ")


class _Remembered(dict[int, T]):
    """What is known of tokens, found when it is first asked for; at most as many as the vocabulary has."""

    def __init__(self, find: Callable[[int], T]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> T:
        found = self[token_id] = self._find(token_id)
        return found


def _bytes_of_alphabet() -> dict[str, int]:
    """The alphabet in which byte-level vocabularies write bytes: visible Latin-1 characters stand for themselves, the
    other bytes, in order, for the characters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + order): byte for order, byte in enumerate(others)}


_BYTE_OF = _bytes_of_alphabet()


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _is_byte_level(decoder: Mapping[str, Any]) -> bool:
    kinds = [step.get("type") for step in _steps(decoder)]
    return kinds in (["ByteLevel"], ["ByteLevel", "Fuse"], ["Fuse", "ByteLevel"])


def _stripped_by_fallback(decoder: Mapping[str, Any]) -> int | None:
    """Return how many spaces a decoder with byte fallback strips at the beginning; None: it is another decoder."""
    steps = _steps(decoder)
    if [step.get("type") for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"] or len(steps) > 4:
        return None
    if steps[0].get("pattern") != {"String": _SPACE} or steps[0].get("content") != " ":
        return None
    if len(steps) == 3:
        return 0
    strip = steps[3]
    if strip.get("type") != "Strip" or strip.get("content") != " " or strip.get("stop") != 0:
        return None
    return int(strip["start"])
