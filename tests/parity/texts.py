"""Token ids to text and back by the tokenizers package alone, and the prompts."""

from functools import cache

from tokenizers import Tokenizer

from tests.model_matrix import TINY_PATH


@cache
def reference() -> Tokenizer:
    return Tokenizer.from_file(str(TINY_PATH / "tokenizer.json"))


def text_of(token_ids: list[int]) -> str:
    decoded: str = reference().decode(token_ids, skip_special_tokens=True)
    return decoded


def ids_of(text: str) -> tuple[int, ...]:
    """As for a prompt: with what the tokenizer puts around it."""
    return tuple(reference().encode(text).ids)


@cache
def corpus() -> list[int]:
    text = (TINY_PATH.parents[1] / "LICENSE").read_text()
    ids: list[int] = reference().encode(text, add_special_tokens=False).ids
    return ids
