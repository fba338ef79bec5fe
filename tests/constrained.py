"""The tiny model's tokens under constraints: where its grammars come from, and what its texts must be."""

import contextlib
import json
import re
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

import jsonschema

from core.clock import MonotonicClock
from core.constraint import Constraint, ConstraintKind
from core.vocabulary import Vocabulary
from grammar.config import GrammarConfig
from grammar.host import ModelTokens
from grammar.library import GrammarLibrary

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
EOS = 2
VOCAB_SIZE = 4096
TOKENS = ModelTokens(TINY, VOCAB_SIZE, (EOS,))

PERSON = Constraint(
    ConstraintKind.JSON_SCHEMA,
    json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "kind": {"enum": ["cat", "dog", None]},
                "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            },
            "required": ["name", "age", "kind", "tags"],
            "additionalProperties": False,
        }
    ),
)
OBJECT = Constraint(ConstraintKind.JSON_OBJECT)
REGEX = Constraint(ConstraintKind.REGEX, r"[A-Z][a-z]{2,8}@(example|test)\.(com|org)")
CHOICE = Constraint(ConstraintKind.CHOICE, json.dumps(["yes", "no", "perhaps", 'quo"ted\n', "caf\u00e9 \U0001f600"]))
SUMS = Constraint(ConstraintKind.GRAMMAR, 'root ::= term (" + " term){1,4}\nterm ::= "0" | [1-9] [0-9]? | "(" root ")"')
WORDS = Constraint(ConstraintKind.REGEX, "[a-z]+( [a-z]+)*")  # may end at any place, or go on for ever
TAG = Constraint(
    ConstraintKind.STRUCTURAL_TAG,
    json.dumps(
        {
            "type": "structural_tag",
            "format": {
                "type": "tag",
                "begin": "<call>",
                "content": {
                    "type": "json_schema",
                    "json_schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
                },
                "end": "</call>",
            },
        }
    ),
)
ALL = {"schema": PERSON, "object": OBJECT, "regex": REGEX, "choice": CHOICE, "grammar": SUMS, "tag": TAG}


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TINY / "tokenizer.json")


def text_of(token_ids: list[int]) -> str:
    return vocabulary().decode(token_ids)


def assert_valid(constraint: Constraint, text: str) -> None:
    """Assert that a finished text is what `constraint` allows, by other means than the engine's."""
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            assert isinstance(json.loads(text), dict)
        case ConstraintKind.JSON_SCHEMA:
            jsonschema.validate(json.loads(text), json.loads(constraint.text), jsonschema.Draft202012Validator)
        case ConstraintKind.REGEX:
            assert re.fullmatch(constraint.text, text)
        case ConstraintKind.CHOICE:
            assert text in json.loads(constraint.text)
        case ConstraintKind.GRAMMAR:
            assert constraint is SUMS
            assert re.fullmatch(r"[\d()+ ]+", text)
            assert eval(text) >= 0  # a sum of numbers, as the line before says
        case ConstraintKind.STRUCTURAL_TAG:
            assert constraint is TAG
            assert isinstance(json.loads(text.removeprefix("<call>").removesuffix("</call>"))["x"], int)


@contextlib.asynccontextmanager
async def library(**settings: object) -> AsyncIterator[GrammarLibrary]:
    settings = {"compile_timeout_s": 60.0, **settings}
    made = GrammarLibrary(GrammarConfig.model_validate(settings), TOKENS, MonotonicClock())
    try:
        yield made
    finally:
        await made.close()
