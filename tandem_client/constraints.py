"""What a text must be, as the `constraint` of a call. It is enforced token by token."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from core.constraint import Constraint, ConstraintKind


def json_object() -> Constraint:
    """Any JSON object."""
    return Constraint(ConstraintKind.JSON_OBJECT)


def json_schema(schema: Mapping[str, Any] | str) -> Constraint:
    """JSON of this schema."""
    return Constraint(ConstraintKind.JSON_SCHEMA, schema if isinstance(schema, str) else json.dumps(schema))


def regex(expression: str) -> Constraint:
    """A text that this expression matches whole."""
    return Constraint(ConstraintKind.REGEX, expression)


def one_of(choices: Sequence[str]) -> Constraint:
    """Exactly one of these."""
    return Constraint(ConstraintKind.CHOICE, json.dumps(list(choices), ensure_ascii=False))


def grammar(text: str) -> Constraint:
    """A text of this grammar (GBNF or EBNF), whose first rule is `root`."""
    return Constraint(ConstraintKind.GRAMMAR, text)


def structural_tag(tag: Mapping[str, Any] | str) -> Constraint:
    """Free text with constrained parts."""
    return Constraint(ConstraintKind.STRUCTURAL_TAG, tag if isinstance(tag, str) else json.dumps(tag))
