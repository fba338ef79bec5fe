"""What the text must be, in the words of OpenAI (`response_format`), of vLLM (`structured_outputs`, `guided_*`) and of
SGLang (`regex`, `ebnf`, `json_schema`), as one constraint."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from router.http.fields import Items, RequestModel, TextOrObject, dump_json

_MAX_CHOICES = 4096


class ConstraintFields(RequestModel):
    """At most one of them counts."""

    response_format: dict[str, Any] | None = Field(
        None, description="type: text, json_object, json_schema or structural_tag"
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="one of json, regex, choice, grammar, json_object, structural_tag"
    )
    guided_json: TextOrObject | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | None = Field(None, description="as in SGLang")
    regex: str | None = Field(None, description="as in SGLang")
    ebnf: str | None = Field(None, description="as in SGLang")

    def constraint(self) -> tuple[Constraint | None, str]:
        """Return what the text must be, and the field that said so.

        Raises:
            InvalidRequest: the field says nothing that can be understood, or several speak.
        """
        found = [
            *_of_response_format(self.response_format),
            *_of_structured_outputs(self.structured_outputs),
            *_of_text("guided_regex", ConstraintKind.REGEX, self.guided_regex),
            *_of_text("guided_grammar", ConstraintKind.GRAMMAR, self.guided_grammar),
            *_of_text("regex", ConstraintKind.REGEX, self.regex),
            *_of_text("ebnf", ConstraintKind.GRAMMAR, self.ebnf),
            *_of_text("json_schema", ConstraintKind.JSON_SCHEMA, self.json_schema),
        ]
        if self.guided_json is not None:
            found.append((schema_constraint("guided_json", self.guided_json), "guided_json"))
        if self.guided_choice is not None:
            found.append((_choice("guided_choice", self.guided_choice), "guided_choice"))
        if len(found) > 1:
            raise InvalidRequest(found[1][1], f"cannot be combined with {found[0][1]}: one constraint holds")
        return found[0] if found else (None, "")


_Found = list[tuple[Constraint, str]]


def _of_response_format(response_format: Mapping[str, Any] | None) -> _Found:
    if response_format is None:
        return []
    field = "response_format"
    match response_format.get("type"):
        case "text":
            return []
        case "json_object":
            if response_format.get("schema") is not None:  # as llama.cpp and others have it
                return [(schema_constraint(f"{field}.schema", response_format["schema"]), f"{field}.schema")]
            return [(Constraint(ConstraintKind.JSON_OBJECT), field)]
        case "json_schema":
            wrapper = response_format.get("json_schema")
            if not isinstance(wrapper, dict):
                raise InvalidRequest(f"{field}.json_schema", "must be an object with a schema")
            schema = wrapper.get("schema")
            if schema is None:
                raise InvalidRequest(f"{field}.json_schema.schema", "is missing")
            name = f"{field}.json_schema.schema"
            return [(schema_constraint(name, schema), name)]
        case "structural_tag":
            tag = {key: value for key, value in response_format.items() if value is not None}
            return [(Constraint(ConstraintKind.STRUCTURAL_TAG, dump_json(field, tag)), field)]
        case None:
            raise InvalidRequest(f"{field}.type", "is missing")
        case other:
            raise InvalidRequest(f"{field}.type", f"{str(other)[:64]!r} is not supported by this server")


_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def _of_structured_outputs(options: Mapping[str, Any] | None) -> _Found:
    if options is None:
        return []
    field = "structured_outputs"
    for name, value in options.items():
        if name not in _STRUCTURED and value not in (None, False):
            raise InvalidRequest(f"{field}.{name[:64]}", "is not supported by this server")
    said = [name for name in _STRUCTURED if options.get(name) not in (None, False)]
    if len(said) != 1:
        raise InvalidRequest(field, f"must have exactly one of {', '.join(_STRUCTURED)}")
    name, value = said[0], options[said[0]]
    where = f"{field}.{name}"
    match name:
        case "json":
            return [(schema_constraint(where, value), where)]
        case "choice":
            return [(_choice(where, value), where)]
        case "json_object":
            if value is not True:
                raise InvalidRequest(where, "must be a boolean")
            return [(Constraint(ConstraintKind.JSON_OBJECT), where)]
        case "structural_tag" if isinstance(value, dict):
            return [(Constraint(ConstraintKind.STRUCTURAL_TAG, dump_json(where, value)), where)]
        case _:
            if not isinstance(value, str):
                raise InvalidRequest(where, "must be a string")
            return _of_text(where, ConstraintKind(name), value)


def _of_text(field: str, kind: ConstraintKind, text: str | None) -> _Found:
    if text is None:
        return []
    if not text:
        raise InvalidRequest(field, "must not be empty")
    return [(Constraint(kind, text), field)]


def schema_constraint(field: str, schema: object) -> Constraint:
    """Return the constraint of a JSON schema: an object, a boolean, or the JSON text of one.

    Raises:
        InvalidRequest: naming `field`.
    """
    if isinstance(schema, str):
        return Constraint(ConstraintKind.JSON_SCHEMA, schema)
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(field, "must be a JSON schema: an object")
    return Constraint(ConstraintKind.JSON_SCHEMA, dump_json(field, schema))


def _choice(field: str, choices: object) -> Constraint:
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
        raise InvalidRequest(field, "must be a list of strings")
    if not 0 < len(choices) <= _MAX_CHOICES:
        raise InvalidRequest(field, f"must have 1 to {_MAX_CHOICES} strings, got {len(choices)}")
    return Constraint(ConstraintKind.CHOICE, dump_json(field, choices))
