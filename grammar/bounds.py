"""What is refused of a constraint before anybody tries to compile it: pure, and cheap whatever it says.

The verdict depends on the text and the limits only. What passes may still be refused by the compiler (`service`).
"""

import json
from typing import Any

from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from grammar.config import GrammarLimits
from grammar.patterns import check_grammar_text, check_regex
from grammar.schemas import SchemaCheck

FIELD = "sampling.constraint"


def field_of(constraint: Constraint) -> str:
    """Return the request's field that holds it, as errors name it."""
    return f"{FIELD}.{constraint.kind}"


def check(constraint: Constraint, limits: GrammarLimits) -> None:
    """Refuse what is too large, malformed, or known not to be enforceable.

    Raises:
        InvalidRequest: naming the field, and the place in it.
    """
    field, text = field_of(constraint), constraint.text
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"is no valid Unicode text: {error.reason}") from error
    if num_bytes > limits.max_bytes:
        raise InvalidRequest(field, f"has {num_bytes} bytes, at most {limits.max_bytes} are allowed")
    if "\0" in text:
        raise InvalidRequest(field, "has a null character")
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            if text:
                raise InvalidRequest(field, "takes no text")
        case ConstraintKind.JSON_SCHEMA:
            SchemaCheck(field, read_json(field, text), limits).run()
        case ConstraintKind.REGEX:
            if not text:
                raise InvalidRequest(field, "must not be empty")
            check_regex(field, text, limits)
        case ConstraintKind.CHOICE:
            _check_choices(field, read_json(field, text), limits)
        case ConstraintKind.GRAMMAR:
            if not text.strip():
                raise InvalidRequest(field, "must not be empty")
            check_grammar_text(field, text, limits)
        case ConstraintKind.STRUCTURAL_TAG:
            tag = read_json(field, text)
            if not isinstance(tag, dict):
                raise InvalidRequest(field, "must be a JSON object")
            _check_tag(field, tag, limits, 0)


def read_json(field: str, text: str) -> Any:
    """Raises: InvalidRequest, when `text` is no JSON, or nested too deep to be read."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequest(field, "is nested too deep") from None
    except ValueError as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_choices(field: str, choices: Any, limits: GrammarLimits) -> None:
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise InvalidRequest(field, "must be a JSON array of strings, none of them empty")
    if len(choices) > limits.max_alternatives:
        raise InvalidRequest(field, f"has {len(choices)} choices, at most {limits.max_alternatives} are allowed")
    for choice in choices:
        try:
            choice.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(field, f"is no valid Unicode text: {error.reason}") from error


def _check_tag(field: str, part: Any, limits: GrammarLimits, depth: int) -> None:
    """Look for everything within a structural tag that has a check of its own."""
    if depth > 4 * limits.max_depth:
        raise InvalidRequest(field, "is nested too deep")
    if isinstance(part, list):
        if len(part) > limits.max_alternatives:
            raise InvalidRequest(field, f"has a list of {len(part)}, at most {limits.max_alternatives} are allowed")
        for one in part:
            _check_tag(field, one, limits, depth + 1)
    elif isinstance(part, dict):
        for key, value in part.items():
            match key:
                case "json_schema" | "schema":
                    SchemaCheck(field, value, limits).run()
                case "pattern" if isinstance(value, str):
                    check_regex(field, value, limits)
                case "grammar" if isinstance(value, str):
                    check_grammar_text(field, value, limits)
                case _:
                    _check_tag(field, value, limits, depth + 1)
