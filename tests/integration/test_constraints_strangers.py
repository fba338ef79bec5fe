"""Constraints that were made to harm: what they cost others, and what is left of them."""

import gc
import json

import pytest

from core.clock import MonotonicClock
from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from grammar.config import GrammarConfig
from grammar.service import GrammarService
from tests.constrained import CHOICE, TOKENS

K = ConstraintKind
FACE = "\U0001f600"
AS_LARGE_AS_ALLOWED = {
    "four bytes a character": Constraint(K.CHOICE, json.dumps([FACE * 16_000], ensure_ascii=False)),
    "control characters": Constraint(K.GRAMMAR, 'root ::= "a" #' + "\x01" * 65_000),
    "twice the default": Constraint(K.GRAMMAR, 'root ::= "a" #' + FACE * 32_000),
}
IGNORED_IN_PART = {
    "multipleOf too large": (K.JSON_SCHEMA, '{"type": "integer", "multipleOf": 5000}', "ignoring multipleOf"),
    "multipleOf in a range": (K.JSON_SCHEMA, '{"type": "integer", "multipleOf": 2, "minimum": 1}', "ignoring multiple"),
    "lookahead in a pattern": (K.JSON_SCHEMA, '{"type": "string", "pattern": "(?=a)b"}', "Lookahead"),
    "anchor in a pattern": (K.JSON_SCHEMA, '{"type": "string", "pattern": "a^b"}', "is ignored"),
    "anchor in a regex": (K.REGEX, "a$b", "is ignored"),
    "anchors of another dialect": (K.REGEX, r"\Aa\Z", "not recognized"),
    "regex in a tag": (K.STRUCTURAL_TAG, '{"format": {"type": "regex", "pattern": "a$b"}}', "is ignored"),
}


def service() -> GrammarService:
    limits = {"max_bytes": 131_072}
    return GrammarService(GrammarConfig.model_validate({"limits": limits}), TOKENS, MonotonicClock())


async def problem_of(judge: GrammarService, constraint: Constraint) -> str:
    """Return what is said against it; empty: nothing."""
    try:
        await judge.check(constraint)
    except InvalidRequest as refusal:
        return refusal.problem
    return ""


async def test_the_largest_texts_end_no_process_of_others() -> None:
    judge = service()
    try:
        assert not await problem_of(judge, CHOICE)
        server = judge._host._server
        assert server is not None
        for name, constraint in AS_LARGE_AS_ALLOWED.items():
            assert "broke" not in await problem_of(judge, constraint), name
            assert not await problem_of(judge, Constraint(K.REGEX, name)), "others are judged"
            assert judge._host._server is server, name
    finally:
        await judge.close()


async def test_what_the_compiler_would_ignore_is_refused_and_not_repeated_in_our_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    judge = service()
    try:
        for name, (kind, text, problem) in IGNORED_IN_PART.items():
            assert problem in await problem_of(judge, Constraint(kind, text)), name
    finally:
        await judge.close()
    assert "Warning" not in capfd.readouterr().err


async def test_verdicts_are_kept_without_the_texts() -> None:
    judge = service()
    try:
        for text in ('root ::= "a"', "root ::= (("):
            constraint = Constraint(K.GRAMMAR, text + " #" + "x" * 10_000)
            assert await problem_of(judge, constraint) == await problem_of(judge, constraint)
        del constraint
        gc.collect()
        assert len(judge._verdicts) == 2
        assert not [one for one in gc.get_objects() if type(one) is Constraint and one.text.endswith("xxx")]
    finally:
        await judge.close()
