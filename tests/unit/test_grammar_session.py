"""What a compiled constraint lets through: every text that random tokens complete is valid by a second judge.

Here xgrammar runs in the test's own process; that it has processes of its own is tested in `integration`.
"""

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.constraint import Constraint, ConstraintKind
from grammar import bounds
from grammar.compiling import Tokens, compile_constraint
from grammar.config import GrammarLimits
from grammar.session import Session
from grammar.wire import Status
from tests.constrained import ALL, EOS, TINY, VOCAB_SIZE, assert_valid, vocabulary

K = ConstraintKind
TOKENS = Tokens.load(TINY, VOCAB_SIZE, (EOS,))
COMPILER = xgrammar.GrammarCompiler(TOKENS.info, max_threads=1, cache_enabled=False)


def session(constraint: Constraint) -> Session:
    bounds.check(constraint, GrammarLimits())
    return Session(TOKENS, compile_constraint(COMPILER, constraint, TOKENS))


def allowed(status: Status, mask: bytes) -> list[int]:
    if status is Status.ANY:
        return list(range(VOCAB_SIZE))
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits[:VOCAB_SIZE]).tolist()
    return found


def random_text(walked: Session, seed: int, max_tokens: int = 400) -> str | None:
    """Return a text of random tokens, mostly short ones so that it ends; None when it does not."""
    rng = random.Random(seed)
    walked.open(1, (EOS,))
    tokens: list[int] = []
    status, mask = walked.advance(1, ())
    while len(tokens) < max_tokens:
        if status is Status.OVER:
            return vocabulary().decode(tokens)
        assert status in (Status.MASK, Status.ANY)
        choices = allowed(status, mask)
        if EOS in choices and (len(tokens) > 20 or rng.random() < 0.3):
            assert walked.advance(1, (EOS,))[0] is Status.OVER
            return vocabulary().decode(tokens)
        choices = [one for one in choices if one != EOS]
        few = rng.sample(choices, min(4, len(choices)))
        tokens.append(min(few, key=lambda one: len(vocabulary().token_bytes(one))))
        status, mask = walked.advance(1, (tokens[-1],))
    return None


@pytest.mark.parametrize("name", ALL)
def test_every_complete_text_is_valid(name: str) -> None:
    walked = session(ALL[name])
    texts = [text for seed in range(30) if (text := random_text(walked, seed)) is not None]
    assert texts
    for text in texts:
        assert_valid(ALL[name], text)


SCHEMAS: dict[str, dict[str, Any]] = {
    "integer bounds": {"type": "integer", "minimum": -17, "exclusiveMaximum": 203},
    "number bounds": {"type": "number", "exclusiveMinimum": -2.5, "maximum": 10.25},
    "multiples": {"type": "integer", "multipleOf": 7},
    "multiples in bounds": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 500},
    "length": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": r"^[a-f]{2}-\d+$"},
    "open pattern": {"type": "string", "pattern": "[ -~]b.[^c]"},
    "several types": {"type": ["integer", "string", "null", "boolean"], "maxLength": 2, "minimum": 5},
    "pairs": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": {"type": "null"}},
    "few items": {"type": "array", "items": {"enum": [1, "a", None]}, "minItems": 2, "maxItems": 4},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}, "maxProperties": 2},
    "names": {"type": "object", "propertyNames": {"pattern": "^[a-c]{1,3}$"}, "maxProperties": 3},
    "pattern of names": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}},
    "optional": {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    "required": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": [3, {"d": "e"}]}},
        "required": ["c", "a"],
        "minProperties": 2,
    },
    "additional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"type": "string", "maxLength": 3},
        "maxProperties": 3,
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["v", "kids"],
            }
        },
        "$ref": "#/$defs/tree",
    },
    "by tag": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "x": {"type": "integer"}}, "required": ["k", "x"]},
            {"type": "object", "properties": {"k": {"const": "b"}, "y": {"type": "null"}}, "required": ["k", "y"]},
        ]
    },
    "names to be escaped": {"type": "object", "properties": {'a"\\\n\u00e9': {"const": '"\\\t\u00e9'}}, "required": []},
    "unknown to nobody": {},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_complete_text_satisfies_its_schema(name: str) -> None:
    walked = session(Constraint(K.JSON_SCHEMA, json.dumps(SCHEMAS[name])))
    texts = [text for seed in range(25) if (text := random_text(walked, seed)) is not None]
    assert len(texts) > 3 or name == "unknown to nobody"
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name], jsonschema.Draft202012Validator)


FORMATTED = {
    "date": r"\d{4}-\d\d-\d\d",
    "time": r"\d\d:\d\d:.*",
    "date-time": r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:.*",
    "uuid": r"[0-9a-fA-F-]{36}",
    "ipv4": r"(\d{1,3}\.){3}\d{1,3}",
}


@pytest.mark.parametrize("name", FORMATTED)
def test_formats_are_enforced(name: str) -> None:
    walked = session(Constraint(K.JSON_SCHEMA, json.dumps({"type": "string", "format": name})))
    texts = [text for seed in range(10) if (text := random_text(walked, seed)) is not None]
    assert texts
    assert all(re.fullmatch(FORMATTED[name], json.loads(text)) for text in texts)


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 999),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4), min_size=1, max_size=3),
    ),
)
NAMES = st.text("abc\u00e9\"' \\", min_size=1, max_size=3)


def objects(part: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
    return st.builds(
        lambda parts, needs: {
            "type": "object",
            "properties": parts,
            "required": [name for name, need in zip(parts, needs, strict=False) if need],
            "additionalProperties": False,
        },
        st.dictionaries(NAMES, part, min_size=1, max_size=3),
        st.lists(st.booleans(), min_size=3, max_size=3),
    )


GENERATED: st.SearchStrategy[dict[str, object]] = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        objects(part),
        st.builds(
            lambda one, low, more: {"type": "array", "items": one, "minItems": low, "maxItems": low + more},
            part,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(part, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(GENERATED, st.integers(0, 2**31))
def test_every_complete_text_satisfies_any_schema(schema: dict[str, object], seed: int) -> None:
    text = random_text(session(Constraint(K.JSON_SCHEMA, json.dumps(schema))), seed)
    # Bytes that are no UTF-8 (random tokens make them, models do not) count as one character to the compiler.
    if text is not None and "\ufffd" not in text:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=8).filter(lambda one: "\0" not in one), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_a_choice_is_one_of_the_choices_to_the_letter(choices: list[str], seed: int) -> None:
    walked = session(Constraint(K.CHOICE, json.dumps(choices)))
    assert random_text(walked, seed) in choices


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [
        (Constraint(K.GRAMMAR, 'root ::= root "a"'), "no text can match"),
        (Constraint(K.JSON_SCHEMA, '{"$ref": "#"}'), "no text can match"),
        (Constraint(K.GRAMMAR, 'root ::= ""'), "only the empty text"),
        (Constraint(K.GRAMMAR, 'root ::= "a" other\nother ::= other "b"'), "no token can complete"),
        (Constraint(K.REGEX, "[a-z]+"), ""),
        (Constraint(K.JSON_OBJECT), ""),
    ],
    ids=["left recursion", "reference to itself", "empty", "dead end", "good", "object"],
)
def test_a_rehearsal_finds_what_cannot_be_followed(constraint: Constraint, problem: str) -> None:
    assert problem in session(constraint).rehearse(10.0)
    assert bool(problem) == bool(session(constraint).rehearse(10.0))


def test_a_token_that_does_not_fit_is_refused() -> None:
    walked = session(Constraint(K.REGEX, "[a-c]+"))
    walked.open(1, (EOS,))
    wrong = vocabulary().encode("z", with_markers=False)[0]
    assert walked.advance(1, (wrong,)) == (Status.REFUSED, b"")


def test_only_ends_without_text_are_ends() -> None:
    """A stop token that is text, asked for by a request, is text to its constraint."""
    letter = vocabulary().encode("a", with_markers=False)[0]
    walked = session(Constraint(K.REGEX, "b*"))
    walked.open(1, (EOS, letter))
    assert EOS in allowed(*walked.advance(1, ()))
    assert letter not in allowed(*walked.advance(1, ()))
    walked.open(2, ())
    assert EOS not in allowed(*walked.advance(2, ()))


def test_special_tokens_are_no_text_and_a_tag_may_name_one() -> None:
    special = vocabulary().special_tokens
    walked = session(Constraint(K.REGEX, r"(.|\n)*"))
    walked.open(1, ())
    assert not set(special.values()) & set(allowed(*walked.advance(1, ())))
    tag = {
        "type": "tag",
        "begin": {"type": "token", "token": "<|system|>"},
        "content": {"type": "const_string", "value": "hi"},
        "end": "",
    }
    walked = session(Constraint(K.STRUCTURAL_TAG, json.dumps({"type": "structural_tag", "format": tag})))
    walked.open(1, ())
    assert allowed(*walked.advance(1, ())) == [special["<|system|>"]]
    walked.advance(1, (special["<|system|>"],))
    assert walked.advance(1, tuple(vocabulary().encode("hi", with_markers=False)))[0] is Status.OVER


def test_the_short_form_of_a_structural_tag() -> None:
    short = {
        "structures": [{"begin": "<f>", "schema": {"type": "integer", "maximum": 9, "minimum": 0}, "end": "</f>"}],
        "triggers": ["<f>"],
    }
    walked = session(Constraint(K.STRUCTURAL_TAG, json.dumps(short)))
    walked.open(1, (EOS,))
    status, mask = walked.advance(1, tuple(vocabulary().encode("free text <f>", with_markers=False)))
    texts = {vocabulary().token_bytes(one).strip()[:1] for one in allowed(status, mask)}
    assert texts <= {b"", *(str(digit).encode() for digit in range(10))}
