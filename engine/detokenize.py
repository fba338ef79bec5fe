"""The checkpoint's tokenizer, as far as the engine needs it: text of token ids, to find stop strings."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from core.errors import ConfigError
from core.text import Decode

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_decode(path: Path) -> Decode | None:
    """Return the decoder of the checkpoint in folder `path`; None when it has no tokenizer.

    Special tokens give no text: a generation that should end at one names it as a stop token.

    Raises:
        ConfigError: there is a tokenizer, but it cannot be read.
    """
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model.path: {path}: cannot load the tokenizer: {line.strip()}") from error

    def decode(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    return decode
