"""Incremental detokenisation and stop strings, against decoding everything at once."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.text import IncrementalDetokenizer, StopScanner


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte tokenizer: one id per byte, as byte-level BPE does for rare characters."""
    return bytes(ids).decode("utf-8", errors="replace")


S = TypeVar("S", str, list[int])


def pieces_of(ids: S, sizes: Sequence[int]) -> list[S]:
    pieces: list[S] = []
    start = 0
    for size in sizes:
        pieces.append(ids[start : start + size])
        start += size
    pieces.append(ids[start:])
    return pieces


@given(st.text(max_size=60), st.lists(st.integers(0, 5), max_size=30))
def test_pieces_add_up_to_the_text(text: str, sizes: list[int]) -> None:
    ids = list(text.encode())
    detokenizer = IncrementalDetokenizer(decode_bytes)
    shown = [detokenizer.push(piece) for piece in pieces_of(ids, sizes)]
    assert "".join(shown) + detokenizer.flush() == text


@given(st.text(alphabet="aé漢🙂", min_size=1, max_size=20))
def test_no_piece_shows_half_a_character(text: str) -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    for byte in text.encode():
        assert "�" not in detokenizer.push([byte])


def test_broken_bytes_come_out_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    assert detokenizer.push(list(b"ok")) == "ok"
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert detokenizer.flush() == "�"


@given(st.text(max_size=200), st.lists(st.integers(0, 40), max_size=30))
def test_long_pieces_add_up_too(text: str, sizes: list[int]) -> None:
    """Pieces longer than what may be held back, ending in the middle of characters."""
    detokenizer = IncrementalDetokenizer(decode_bytes)
    shown = [detokenizer.push(piece) for piece in pieces_of(list(text.encode()), sizes)]
    assert "".join(shown) + detokenizer.flush() == text


@given(st.lists(st.integers(0x80, 0xFF) | st.sampled_from(b"a\xc3\xa9\xf0\x9f"), min_size=40, max_size=120))
def test_broken_bytes_are_not_held_back_for_ever(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    shown = ""
    for at, byte in enumerate(ids):
        shown += detokenizer.push([byte])
        assert len(shown) >= len(decode_bytes(ids[: at + 1])) - 17
    assert shown + detokenizer.flush() == decode_bytes(ids)


SILENT = 256


def decode_words(ids: Sequence[int]) -> str:
    """Bytes and a special token without text; a space at the very beginning is dropped, as sentencepiece does."""
    return decode_bytes([one for one in ids if one != SILENT]).removeprefix(" ")


@pytest.mark.parametrize("silence", [[SILENT], [0x80]], ids=["special tokens", "broken bytes"])
def test_the_window_stays_small_while_no_text_comes(silence: list[int]) -> None:
    sizes: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode_words(ids)

    detokenizer = IncrementalDetokenizer(decode, list(b"prompt"))
    shown = detokenizer.push(list(b" one"))
    for _ in range(300):
        shown += detokenizer.push(silence)
    for byte in b" two":
        shown += detokenizer.push([byte])
    shown += detokenizer.flush()
    assert max(sizes) < 64
    assert shown == decode_words([*b"prompt one", *silence * 300, *b" two"]).removeprefix("prompt")


@given(
    st.text(alphabet="ab", max_size=40),
    st.lists(st.integers(0, 4), max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_is_found_wherever_the_pieces_break(text: str, sizes: list[int], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    expected_end = min(
        (end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)), default=None
    )
    consumed = ""
    for piece in pieces_of(text, sizes):
        shown += scanner.push(piece)
        consumed += piece
        # Never later than the piece that completes a match, never earlier.
        assert (scanner.matched is not None) == (expected_end is not None and len(consumed) >= expected_end)
    if scanner.matched is None:
        assert shown + scanner.flush() == text
    else:
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown + scanner.matched)


def test_the_earliest_match_wins_then_the_first_listed() -> None:
    scanner = StopScanner(["cd", "bcd", "b"])
    assert scanner.push("abcd") == "a"
    assert scanner.matched == "bcd"
    assert scanner.push("more") == ""
