"""What is refused of a constraint before anything is compiled, and by which name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from grammar import bounds
from grammar.config import GrammarLimits

K = ConstraintKind
LIMITS = GrammarLimits()


def deep(levels: int) -> str:
    return '{"type":"array","items":' * levels + "true" + "}" * levels


def schema(**keywords: object) -> tuple[ConstraintKind, str]:
    return K.JSON_SCHEMA, json.dumps(keywords)


REFUSED: dict[str, tuple[tuple[ConstraintKind, str], str]] = {
    "object with text": ((K.JSON_OBJECT, "{}"), "takes no text"),
    "too many bytes": ((K.GRAMMAR, 'root ::= "' + "a" * 70_000 + '"'), "70011 bytes"),
    "lone surrogate": ((K.REGEX, "\ud800"), "Unicode"),
    "null character": ((K.REGEX, "a\0b"), "null"),
    "no regex": ((K.REGEX, ""), "empty"),
    "long regex": ((K.REGEX, "a" * 5000), "5000 bytes"),
    "count": ((K.REGEX, "a{5000}"), "more than 4096"),
    "open count": ((K.REGEX, "a{5000,}"), "more than 4096"),
    "huge count": ((K.REGEX, "a{1,99999999999999999999}"), "more than 4096"),
    "nested counts": ((K.REGEX, "((a{1,20}){1,20}){1,20}"), "more than 4096"),
    "nested counts behind": ((K.REGEX, "(b|(a{100}c)){100}"), "more than 4096"),
    "counts of counts": ((K.REGEX, "a{100}{100}"), "more than 4096"),
    "deep regex": ((K.REGEX, "(" * 40 + "a" + ")" * 40), "32 deep"),
    "no grammar": ((K.GRAMMAR, " \n"), "empty"),
    "grammar count": ((K.GRAMMAR, 'root ::= ("a" [b-z]{1,300}){300}'), "more than 4096"),
    "deep grammar": ((K.GRAMMAR, "root ::= " + "(" * 40 + '"a"' + ")" * 40), "32 deep"),
    "choices are no JSON": ((K.CHOICE, "yes"), "is not JSON"),
    "choices are no list": ((K.CHOICE, '{"a": 1}'), "array of strings"),
    "no choices": ((K.CHOICE, "[]"), "array of strings"),
    "empty choice": ((K.CHOICE, '["a", ""]'), "array of strings"),
    "choice of a number": ((K.CHOICE, "[1]"), "array of strings"),
    "many choices": ((K.CHOICE, json.dumps([str(one) for one in range(5000)])), "5000 choices"),
    "surrogate choice": ((K.CHOICE, '["\\ud800"]'), "Unicode"),
    "schema is no JSON": ((K.JSON_SCHEMA, "{"), "is not JSON"),
    "NaN": ((K.JSON_SCHEMA, '{"const": NaN}'), "NaN"),
    "schema false": ((K.JSON_SCHEMA, "false"), "allows nothing"),
    "schema is a list": ((K.JSON_SCHEMA, "[]"), "a schema is an object"),
    "deep schema": ((K.JSON_SCHEMA, deep(40)), "32 schemas deep"),
    "very deep schema": ((K.JSON_SCHEMA, deep(2000)), "too deep"),
    "many schemas": (schema(type="array", items={"anyOf": [True] * 5000}), "more than 4096"),
    "many values": (schema(enum=list(range(5000))), "5000 values"),
    "unknown keyword": (schema(type="string", nullable=True), "nullable is not supported"),
    "not": (schema(**{"not": {"type": "string"}}), "not is not supported"),
    "if": (schema(**{"if": {"type": "string"}, "then": True}), "if is not supported"),
    "uniqueItems": (schema(type="array", uniqueItems=True), "uniqueItems"),
    "contains": (schema(type="array", contains={"type": "integer"}), "contains"),
    "dependentRequired": (schema(type="object", dependentRequired={"a": ["b"]}), "dependentRequired"),
    "allOf": (schema(allOf=[{"type": "string"}, {"type": "string", "maxLength": 3}]), "allOf of several"),
    "reference to no schema": (schema(**{"$ref": "#/default", "default": {"not": {}}}), "no schema that is known"),
    "reference to a name": (schema(**{"$ref": "#a"}), "only references within"),
    "reference with escapes": (schema(**{"$ref": "#/$defs/a~1b", "$defs": {"a~1b": {}}}), "escapes"),
    "oneOf of no schemas": (
        schema(oneOf=[{"$ref": "#/default"}, {"type": "null"}], default={"type": [{}], "required": [{}]}),
        "no schema that is known",
    ),
    "oneOf overlapping": (schema(oneOf=[{"type": "integer"}, {"type": "number", "minimum": 3}]), "overlap"),
    "multipleOf of numbers": (schema(type="number", multipleOf=0.5), "multipleOf"),
    "pattern and length": (schema(type="string", pattern="a*", maxLength=3), "pattern beside maxLength"),
    "format and length": (schema(type="string", format="date", minLength=3), "format beside minLength"),
    "unknown format": (schema(type="string", format="password"), "format 'password'"),
    "pattern with quote": (schema(type="string", pattern='^"$'), "quotes"),
    "pattern with backslash": (schema(type="string", pattern=r"a\\b"), "quotes"),
    "hostile pattern": (schema(type="string", pattern="(a{100}){100}"), "more than 4096"),
    "no type": (schema(minimum=3), 'minimum without "type"'),
    "required without properties": (schema(type="object", required=["a"]), "'a' is not among"),
    "wrong type for keyword": (schema(type="string", minimum=3), "minimum does not go with type string"),
    "unknown type": (schema(type="text"), "'text' is not one of JSON's"),
    "no types": (schema(type=[]), "type must not be empty"),
    "foreign reference": (schema(**{"$ref": "https://example.com/schema"}), "only references within"),
    "beside reference": (
        schema(**{"$ref": "#/$defs/a", "maxLength": 1, "$defs": {"a": True}}),
        "maxLength beside $ref",
    ),
    "beside anyOf": (schema(type="integer", anyOf=[{"type": "string"}]), "type beside anyOf"),
    "beside enum": (schema(type="integer", enum=[1, "a"]), "type beside enum"),
    "list of items": (schema(type="array", items=[True]), "prefixItems is"),
    "negative length": (schema(type="string", minLength=-1), "natural number"),
    "long length": (schema(type="string", minLength=100_000), "at most 4096"),
    "many items": (schema(type="array", minItems=100_000), "at most 4096"),
    "minProperties": (schema(type="object", minProperties=2), "minProperties"),
    "patterns beside properties": (
        schema(type="object", properties={"ab": True}, patternProperties={"^a": {"type": "string"}}),
        "patternProperties beside",
    ),
    "place is named": (
        schema(type="object", properties={"a": {"type": "array", "items": {"anyOf": [True, {"not": True}]}}}),
        "/properties/a/items/anyOf/1: not is not supported",
    ),
    "tag is no object": ((K.STRUCTURAL_TAG, "[]"), "JSON object"),
    "schema in a tag": (
        (K.STRUCTURAL_TAG, json.dumps({"format": {"type": "json_schema", "json_schema": {"not": True}}})),
        "not is not supported",
    ),
    "regex in a tag": ((K.STRUCTURAL_TAG, '{"format": {"type": "regex", "pattern": "a{9999}"}}'), "more than 4096"),
    "deep tag": ((K.STRUCTURAL_TAG, '{"content":' * 200 + "{}" + "}" * 200), "too deep"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    (kind, text), problem = REFUSED[name]
    with pytest.raises(InvalidRequest) as error:
        bounds.check(Constraint(kind, text), LIMITS)
    assert error.value.field == f"sampling.constraint.{kind}"
    assert problem in error.value.problem
    assert "\n" not in str(error.value)


ALLOWED: dict[str, tuple[ConstraintKind, str]] = {
    "object": (K.JSON_OBJECT, ""),
    "choice": (K.CHOICE, '["a", "b"]'),
    "regex": (K.REGEX, r"(\d{1,3}\.){3}\d{1,3}|[{}]{2}|\{9999\}"),
    "many small counts": (K.REGEX, "a{1,2000}b{1,2000}"),
    "a count in a literal": (K.GRAMMAR, 'root ::= "a{99999}" "b"{2,3} # c{1,2}'),
    "true": (K.JSON_SCHEMA, "true"),
    "empty": (K.JSON_SCHEMA, "{}"),
    "recursive": schema(
        type="object",
        properties={"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        required=["value"],
    ),
    "enum of its type": schema(type="string", enum=["a", "b"]),
    "const of its type": schema(type=["integer", "null"], const=3),
    "anyOf of its type": schema(type="object", anyOf=[{"type": "object", "title": "A"}]),
    "one allOf": schema(allOf=[{"$ref": "#/$defs/a"}], default=3, **{"$defs": {"a": {"type": "integer"}}}),
    "oneOf by type": schema(oneOf=[{"type": "integer"}, {"type": "string"}, {"enum": [None]}]),
    "oneOf by tag": schema(
        oneOf=[
            {"$ref": "#/$defs/a"},
            {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}}, "required": ["kind"]},
        ],
        **{"$defs": {"a": {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]}}},
    ),
    "format": schema(type="string", format="date-time"),
    "numbers": schema(type="number", minimum=-1.5, exclusiveMaximum=3),
    "multiples": schema(type="integer", multipleOf=7),
    "pairs": schema(type="array", prefixItems=[{"type": "string"}, True], items=False, minItems=2),
    "map": schema(type="object", additionalProperties={"type": "number"}, maxProperties=4),
    "names": schema(type="object", propertyNames={"pattern": "^[a-z]+$"}),
    "tag": (
        K.STRUCTURAL_TAG,
        json.dumps(
            {
                "type": "structural_tag",
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["<f"],
                    "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": {}}, "end": "</f>"}],
                },
            }
        ),
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str) -> None:
    bounds.check(Constraint(*ALLOWED[name]), LIMITS)


KEYWORDS = st.sampled_from(
    [
        *("type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "required"),
        *("prefixItems", "additionalProperties", "patternProperties", "propertyNames", "minItems", "maxLength"),
        *("pattern", "format", "minimum", "multipleOf", "minProperties", "not", "title", "uniqueItems", "a"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(KEYWORDS, parts, max_size=4),
    max_leaves=12,
)


def refused_field(constraint: Constraint) -> str:
    """Return the field that is named when it is refused, and of the constraint when it is not."""
    try:
        bounds.check(constraint, LIMITS)
    except InvalidRequest as error:
        return error.field
    return bounds.field_of(constraint)


@given(st.dictionaries(KEYWORDS, JSON, max_size=5), st.sampled_from([K.JSON_SCHEMA, K.STRUCTURAL_TAG, K.CHOICE]))
def test_whatever_the_json_it_is_allowed_or_refused(value: dict[str, object], kind: ConstraintKind) -> None:
    assert refused_field(Constraint(kind, json.dumps(value))) == f"sampling.constraint.{kind}"


@given(st.text('ab(){}[]\\"|*+?,0123456789^$. \n', max_size=60), st.sampled_from([K.REGEX, K.GRAMMAR]))
def test_whatever_the_text_it_is_allowed_or_refused(text: str, kind: ConstraintKind) -> None:
    assert refused_field(Constraint(kind, text)) == f"sampling.constraint.{kind}"
