"""Text of ids, a piece at a time, against the tokenizer library's own decoding of the whole."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from core.byte_text import FallbackDetokenizer, Utf8Detokenizer
from core.errors import ConfigError
from core.text import Decode, Detokenizer, IncrementalDetokenizer
from core.vocabulary import Vocabulary
from tests.model_matrix import TINY_PATH

TEXT = "The quick brown fox, 123 naïve cafés; 漢字 and 🙂 emoji — twice: 漢字 🙂. def f(x):\n    return x\n"
SPECIAL, ADDED = "<|mark|>", "<tool call>"


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEXT], trainer)
    return with_added_tokens(core)


def byte_fallback(*, strip: bool) -> Tokenizer:
    """In the way of Llama 2: spaces are written as a mark, one is put before the text, unknown characters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        ["The quick brown fox, 123 and twice: return x"],
        trainers.BpeTrainer(vocab_size=80, show_progress=False, special_tokens=["<unk>"]),
    )
    model = json.loads(trained.to_str())["model"]
    vocab = dict(model["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return with_added_tokens(core)


def with_added_tokens(core: Tokenizer) -> Tokenizer:
    core.add_special_tokens([AddedToken(SPECIAL, special=True)])
    core.add_tokens([AddedToken(ADDED, normalized=False), AddedToken("éclair", normalized=False)])
    return core


def tiny() -> Tokenizer:
    return Tokenizer.from_file(str(TINY_PATH / "tokenizer.json"))


CASES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "tandem-tiny": tiny,
    "llama-2": partial(byte_fallback, strip=True),
    "gemma": partial(byte_fallback, strip=False),
}


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Vocabulary]:
    make = CASES[request.param]
    return make(), Vocabulary(make())


def decode_of(core: Tokenizer) -> Decode:
    return lambda ids: str(core.decode(list(ids), skip_special_tokens=True))


def cut(ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(ids[at : at + size])
        at += size
    return [*pieces, ids[at:]]


def shown(detokenizer: Detokenizer, pieces: Sequence[Sequence[int]]) -> str:
    return "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.flush()


texts = st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("Thequick 漢🙂é\n▁"), max_size=40)
mixed = st.lists(texts | st.sampled_from([SPECIAL, ADDED, "éclair", "👩‍👩‍👧", "  "]), max_size=6).map("".join)
sizes = st.lists(st.integers(0, 4), max_size=40)


def test_the_usual_decoders_have_a_fast_way() -> None:
    kinds = {name: type(Vocabulary(make()).detokenizer()) for name, make in CASES.items()}
    assert kinds == {
        "byte-level": Utf8Detokenizer,
        "tandem-tiny": Utf8Detokenizer,
        "llama-2": FallbackDetokenizer,
        "gemma": FallbackDetokenizer,
    }
    other = byte_level()
    other.decoder = decoders.WordPiece()
    assert type(Vocabulary(other).detokenizer()) is IncrementalDetokenizer


@settings(max_examples=80, deadline=None)
@given(text=mixed, sizes=sizes)
def test_any_cut_gives_the_text_of_the_whole(both: tuple[Tokenizer, Vocabulary], text: str, sizes: list[int]) -> None:
    core, vocabulary = both
    ids = core.encode(text, add_special_tokens=False).ids
    assert vocabulary.encode(text, with_markers=False) == ids
    assert shown(vocabulary.detokenizer(), cut(ids, sizes)) == core.decode(ids) == vocabulary.decode(ids)


@settings(max_examples=80, deadline=None)
@given(prompt=mixed, text=mixed)
def test_token_by_token_it_is_what_decoding_windows_gives(
    both: tuple[Tokenizer, Vocabulary], prompt: str, text: str
) -> None:
    """The reference is slower, and knows nothing of bytes."""
    core, vocabulary = both
    tail = core.encode(prompt, add_special_tokens=False).ids[-8:]
    ids = core.encode(text, add_special_tokens=False).ids
    assume("�" not in core.decode(tail))  # cut inside of a character, the reference loses the next one
    fast, reference = vocabulary.detokenizer(tail), IncrementalDetokenizer(decode_of(core), tail)
    seen = expected = ""
    for one in ids:
        seen += fast.push([one])
        expected += reference.push([one])
        assert seen.startswith(expected), "it is never later"
        assert "�" in core.decode(ids) or "�" not in seen
    assert seen + fast.flush() == expected + reference.flush()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), sizes=sizes)
def test_ids_that_are_no_text_are_cut_without_a_difference(
    both: tuple[Tokenizer, Vocabulary], data: st.DataObject, sizes: list[int]
) -> None:
    """What a model may sample: any ids, so broken characters, special tokens inside of characters."""
    core, vocabulary = both
    ids = data.draw(st.lists(st.integers(0, core.get_vocab_size() - 1), max_size=40))
    whole = shown(vocabulary.detokenizer(), [ids])
    assert shown(vocabulary.detokenizer(), cut(ids, sizes)) == whole
    if type(vocabulary.detokenizer()) is Utf8Detokenizer:
        assert whole == core.decode(ids)


def test_broken_bytes_are_not_held_back_for_ever(both: tuple[Tokenizer, Vocabulary]) -> None:
    core, vocabulary = both
    broken = core.token_to_id("<0xFF>") or core.token_to_id("ÿ")
    assert broken is not None
    detokenizer = vocabulary.detokenizer()
    text = ""
    for num_pushed in range(1, 100):
        text += detokenizer.push([broken])
        assert len(text) > num_pushed - 17
    assert text + detokenizer.flush() == "�" * 99


def test_a_character_that_the_prompt_left_open_is_the_answers(both: tuple[Tokenizer, Vocabulary]) -> None:
    _, vocabulary = both
    ids = vocabulary.encode("x ☃", with_markers=False)
    assert len(ids) > 3
    for at in (1, 2):
        assert shown(vocabulary.detokenizer(ids[:-at]), [ids[-at:]]) == "☃"


@settings(deadline=None)
@given(text=mixed)
def test_the_bytes_of_tokens_add_up(both: tuple[Tokenizer, Vocabulary], text: str) -> None:
    core, vocabulary = both
    ids = core.encode(text, add_special_tokens=False).ids
    joined = b"".join(vocabulary.token_bytes(one) for one in ids).decode("utf-8", "replace")
    lead = " " if "Strip" in str(core.decoder) else ""  # of the mark that Llama puts before a text
    assert joined.removeprefix(lead) == core.decode(ids, skip_special_tokens=False)
    for one in ids:
        assert vocabulary.token_text(one) == vocabulary.token_bytes(one).decode("utf-8", "replace")


def test_single_tokens(both: tuple[Tokenizer, Vocabulary]) -> None:
    core, vocabulary = both
    snowman = vocabulary.encode("☃", with_markers=False)[-3:]
    assert [vocabulary.token_bytes(one) for one in snowman] == [b"\xe2", b"\x98", b"\x83"]
    assert [vocabulary.token_text(one) for one in snowman] == ["�"] * 3
    for name, one in vocabulary.special_tokens.items():
        assert vocabulary.token_text(one) == name
        assert vocabulary.decode([one]) == shown(vocabulary.detokenizer(), [[one]]) == ""
    assert set(vocabulary.special_tokens) == {
        token.content for token in core.get_added_tokens_decoder().values() if token.special
    }


@pytest.mark.parametrize(("content", "problem"), [(None, "no tokenizer.json"), ("{}", "cannot load"), ("", "cannot")])
def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem) as error:
        Vocabulary.load(path)
    assert "\n" not in str(error.value)
