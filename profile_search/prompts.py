"""Validation prompts: a JSONL file with a search split and an acceptance split, read and tokenised.

A row is `{"split": "search" | "acceptance", "text": ...}` or has `"token_ids"` instead of the text; other keys are for
people. The order matters: every prefix of a split should be a fair sample, since successive halving judges prefixes.
"""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import ConfigError

PROMPTS_NAME = "validation_prompts.jsonl"
SPLITS = ("search", "acceptance")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of both splits; `digest` names them."""

    search: tuple[tuple[int, ...], ...]
    acceptance: tuple[tuple[int, ...], ...]
    digest: str


def load_prompts(model_path: Path, file: Path | None = None, *, limit: int | None = None) -> Prompts:
    """Read `file`, by default the one next to the checkpoint.

    Args:
        limit: at most that many of each split.

    Raises:
        ConfigError: there is none, a row is not a prompt, or a split is empty.
    """
    path = file or model_path / PROMPTS_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: no validation prompts; name a JSONL file of them with --prompts")
    tokenizer: Tokenizer | None = None
    splits: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            chosen = splits[row["split"]]
            ids = row.get("token_ids")
            if ids is None:
                tokenizer = tokenizer or Tokenizer.from_file(str(model_path / "tokenizer.json"))
                ids = tokenizer.encode(row["text"]).ids
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: line {number} is not a prompt: {error!r}") from error
        if limit is None or len(chosen) < limit:
            chosen.append(tuple(int(token) for token in ids))
    for split, prompts in splits.items():
        if not prompts:
            raise ConfigError(f"{path}: there is no prompt of split {split!r}")
    search, acceptance = (tuple(splits[split]) for split in SPLITS)
    return Prompts(search, acceptance, blake2b(repr((search, acceptance)).encode(), digest_size=8).hexdigest())
