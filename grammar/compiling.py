"""From a constraint to xgrammar's compiled grammar. Imported by the compiling processes only.

Schemas allow every white space that JSON does, but only so much of it in a row: a small model that may go on with
blanks for ever does. Objects have the properties that their schema names, unless it says otherwise.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import xgrammar

from core.constraint import Constraint, ConstraintKind
from core.vocabulary import Vocabulary

MAX_WHITESPACE = 32
_SOURCE_PREFIX = re.compile(r"^\[[^]]*\] \S+?:\d+: (?:Check failed: .*? is false: )?", re.DOTALL)


def token_texts(path: Path, vocab_size: int, end_token_ids: Collection[int]) -> list[bytes]:
    """Return what each token of the model is as text, by the tokenizer of the checkpoint in folder `path`.

    One that gives no text, as special tokens, padding and what ends a generation, is allowed by no constraint.

    Args:
        vocab_size: of the model; the tokenizer may know fewer or more.
    Raises:
        ConfigError: there is no tokenizer.json, or it cannot be read.
    """
    vocabulary = Vocabulary.load(path / "tokenizer.json")
    silent = frozenset(end_token_ids)
    return [
        b"" if one in silent or vocabulary.is_special(one) else vocabulary.token_bytes(one) for one in range(vocab_size)
    ]


def tokenizer_info(tokens: list[bytes]) -> xgrammar.TokenizerInfo:
    """Return what a compiler knows of the tokens: their bytes, and one id past them that ends every text.

    The real end tokens come with each walk; a request may ignore them all.
    """
    return xgrammar.TokenizerInfo(
        tokens, xgrammar.VocabType.RAW, vocab_size=len(tokens) + 1, stop_token_ids=[len(tokens)]
    )


def compile_constraint(compiler: xgrammar.GrammarCompiler, constraint: Constraint) -> xgrammar.CompiledGrammar:
    """Compile a constraint that passed `grammar.bounds`.

    Raises:
        RuntimeError, ValueError: it is refused; MemoryError.
    """
    text = constraint.text
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return compiler.compile_json_schema('{"type": "object"}', max_whitespace_cnt=MAX_WHITESPACE)
        case ConstraintKind.JSON_SCHEMA:
            return compiler.compile_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE)
        case ConstraintKind.REGEX:
            return compiler.compile_regex(text)
        case ConstraintKind.CHOICE:
            return compiler.compile_grammar(f"root ::= {' | '.join(map(_literal, json.loads(text)))}")
        case ConstraintKind.GRAMMAR:
            return compiler.compile_grammar(text)
        case ConstraintKind.STRUCTURAL_TAG:
            return compiler.compile_structural_tag(_whole_tag(json.loads(text)))


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


def _whole_tag(tag: dict[str, Any]) -> str:
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
    return json.dumps({"type": "structural_tag", **tag})
