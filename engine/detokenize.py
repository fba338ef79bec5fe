"""The checkpoint's tokenizer, as far as the engine needs it: text of token ids, to find stop strings."""

from pathlib import Path

from core.text import NewDetokenizer
from core.vocabulary import Vocabulary

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_detokenizer(path: Path) -> NewDetokenizer | None:
    """Return what makes text of ids for the checkpoint in folder `path`; None when it has no tokenizer.

    Special tokens give no text: a generation that should end at one names it as a stop token.

    Raises:
        ConfigError: there is a tokenizer, but it cannot be read, or it has no tokenizer.json.
    """
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return Vocabulary.load(path / "tokenizer.json").detokenizer
