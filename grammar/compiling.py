"""From a constraint to xgrammar's compiled grammar. Imported by the compiling processes only.

Schemas allow every white space that JSON does, but only so much of it in a row: a small model that may go on with
blanks for ever does. Objects have the properties that their schema names, unless it says otherwise.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xgrammar

from core.constraint import Constraint, ConstraintKind
from core.vocabulary import Vocabulary
from grammar.rewriting import rewritten

MAX_WHITESPACE = 32
_NO_TEXT = b"\xff"  # in no UTF-8, so no grammar of characters matches a token that begins with it
_SOURCE_PREFIX = re.compile(r"^\[[^]]*\] \S+?:\d+: (?:Check failed: .*? is false: )?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a model, as constraints see them.

    Attributes:
        info: their bytes, and one id past them that ends every text: the real end tokens come with each walk.
        silent: those that give no text (special tokens, padding, what ends a generation). Nothing that is spelled out
            allows them; a structural tag may name one, and its free text is as free as any.
        special: the special tokens by their names.
    """

    info: xgrammar.TokenizerInfo
    silent: frozenset[int]
    special: Mapping[str, int]

    @classmethod
    def load(cls, path: Path, vocab_size: int, end_token_ids: Collection[int]) -> "Tokens":
        """Read them from the checkpoint in folder `path`.

        Args:
            vocab_size: of the model; the tokenizer may know fewer or more.
        Raises:
            ConfigError: there is no tokenizer.json, or it cannot be read.
        """
        vocabulary = Vocabulary.load(path / "tokenizer.json")
        silent = {one for one in range(vocab_size) if one in end_token_ids or vocabulary.is_special(one)}
        texts = [
            _NO_TEXT + str(one).encode() if one in silent else vocabulary.token_bytes(one) for one in range(vocab_size)
        ]
        info = xgrammar.TokenizerInfo(
            texts, xgrammar.VocabType.RAW, vocab_size=vocab_size + 1, stop_token_ids=[vocab_size]
        )
        silent.update(one for one, text in enumerate(texts) if not text)
        return cls(info, frozenset(silent), vocabulary.special_tokens)


def compile_constraint(
    compiler: xgrammar.GrammarCompiler, constraint: Constraint, tokens: Tokens
) -> xgrammar.CompiledGrammar:
    """Compile a constraint that passed `grammar.bounds`.

    Raises:
        RuntimeError, ValueError: it is refused; MemoryError.
    """
    text = constraint.text
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return compiler.compile_json_schema('{"type": "object"}', max_whitespace_cnt=MAX_WHITESPACE)
        case ConstraintKind.JSON_SCHEMA:
            schema = json.dumps(rewritten(json.loads(text)))
            return compiler.compile_json_schema(schema, max_whitespace_cnt=MAX_WHITESPACE)
        case ConstraintKind.REGEX:
            return compiler.compile_regex(text)
        case ConstraintKind.CHOICE:
            return compiler.compile_grammar(f"root ::= {' | '.join(map(_literal, json.loads(text)))}")
        case ConstraintKind.GRAMMAR:
            return compiler.compile_grammar(text)
        case ConstraintKind.STRUCTURAL_TAG:
            return compiler.compile_structural_tag(json.dumps(_by_id(_whole_tag(json.loads(text)), tokens.special)))


def warning_in(text: str) -> str:
    """Return the first thing that the compiler said it ignores or takes for something else; empty: nothing. A text that
    breaks the caller's constraint is worse than a refusal."""
    _, _, warning = text.partition("Warning: ")
    return " ".join(warning.split("\n[", 1)[0].split())[:500]


def reason_of(error: Exception) -> str:
    """Return what the compiler says, without the place in its own source."""
    text = _SOURCE_PREFIX.sub("", str(error)).strip()
    return " ".join(text.split())[:500] or type(error).__name__


def _literal(text: str) -> str:
    """Return an EBNF literal."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def _whole_tag(tag: dict[str, Any]) -> dict[str, Any]:
    """Return a structural tag in its full form; the short one of other servers names structures and triggers."""
    if "structures" in tag:
        tags = [
            {
                "begin": one["begin"],
                "content": {"type": "json_schema", "json_schema": one.get("schema", {})},
                "end": one["end"],
            }
            for one in tag["structures"]
        ]
        tag = {"format": {"type": "triggered_tags", "triggers": tag.get("triggers", []), "tags": tags}}
    return {"type": "structural_tag", **tag}


def _by_id(part: Any, special: Mapping[str, int]) -> Any:
    """Return a part of a structural tag with special tokens by their ids: the compiler knows them by nothing else."""
    if isinstance(part, list):
        return [_by_id(one, special) for one in part]
    if not isinstance(part, dict):
        return part
    found: dict[str, Any] = {}
    for key, value in part.items():
        match key, value:
            case "token", str():
                found[key] = special.get(value, value)
            case (("trigger_tokens" | "exclude_tokens"), list()):
                found[key] = [special.get(one, one) if isinstance(one, str) else one for one in value]
            case (("json_schema" | "schema"), _):
                found[key] = rewritten(value)
            case _:
                found[key] = _by_id(value, special)
    return found
