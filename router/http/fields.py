"""What the fields of OpenAI's requests have in common: strict JSON types, and the names of what is not served.

Three kinds of fields: those that are declared in a model are served; those in an `UNSERVED` table are known to users of
such servers but not served here, and refused by name unless they say what happens anyway; all others are ignored, as
OpenAI's clients expect of a server that is older than they are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from core.errors import InvalidRequest

_MAX_PROBLEMS = 8  # that one answer tells of
MAX_ITEMS = 65_536
_FUNCTION_PART = re.compile(r"(tools|tool_calls)(\[\d+\])\.(name|description|parameters|arguments)")


class RequestModel(BaseModel):
    """A request body. JSON's types are not converted: "1" is no number and true is none either."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


M = TypeVar("M", bound=RequestModel)


def _whole(value: object) -> object:
    # JSON has one kind of number: 5.0 is an integer. Beyond 2**64 nothing is in range anyway.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**64 else value


def _text_or_object(value: object) -> object:
    if value is not None and not isinstance(value, str | dict):
        raise ValueError("must be a string or an object")
    return value


TextOrObject = Annotated[str | dict[str, Any], BeforeValidator(_text_or_object)]
Integer = Annotated[int, BeforeValidator(_whole)]
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class _Bounded:
    """A list that is looked at no further than to its first bad item: a body has room for a million."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        assert schema["type"] == "list"
        return core_schema.list_schema(schema["items_schema"], max_length=MAX_ITEMS, fail_fast=True)


Items = Annotated[list[E], _Bounded()]


def read_fields(model: type[M], body: Mapping[str, Any], unserved: Mapping[str, Sequence[object]]) -> M:
    """Return the fields of a body.

    Args:
        unserved: names of fields that are not served, each with the values, besides null, that are harmless.

    Raises:
        InvalidRequest: naming the field.
    """
    for name in body.keys() & unserved.keys():
        value, harmless = body[name], unserved[name]
        if value is not None and not any(_is_same(value, one) for one in harmless):
            raise InvalidRequest(name, "is not supported by this server" + _only(harmless))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _problems(error) from error


def _is_same(value: object, harmless: object) -> bool:
    numbers = (int, float)
    if isinstance(value, bool) or isinstance(harmless, bool):
        return value is harmless
    if isinstance(value, numbers) and isinstance(harmless, numbers):
        return value == harmless
    return type(value) is type(harmless) and value == harmless


def _only(harmless: Sequence[object]) -> str:
    return f"; leave it out or send {' or '.join(map(repr, harmless))}" if harmless else ""


def _problems(error: ValidationError) -> InvalidRequest:
    found = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_PROBLEMS]
    (field, problem), *others = [(path_of(one["loc"]), _problem(one["type"], one["msg"])) for one in found]
    return InvalidRequest(field, problem, others=tuple(others))


def _problem(kind: str, message: str) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "too_long":
        return f"must have at most {MAX_ITEMS} items"
    if message.startswith("Input should be"):
        return "must be" + message.removeprefix("Input should be")
    return message.removeprefix("Value error, ")


def path_of(parts: Sequence[str | int]) -> str:
    """Write a place in a body as `messages[3].content`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "body"


def rename(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Say fields as this API calls them; the longest known beginning of a name counts. What a tool or a call has, its
    `function` has here.

    Returns:
        An error of the same class; `error` itself where no name applies.
    """
    renamed = tuple(
        (_FUNCTION_PART.sub(r"\1\2.function.\3", _renamed(field, names)), problem)
        for field, problem in error.violations
    )
    if renamed == error.violations:
        return error
    (field, problem), *others = renamed
    return type(error)(field, problem, others=tuple(others))


def _renamed(field: str, names: Mapping[str, str]) -> str:
    for old in sorted(names, key=len, reverse=True):
        if field == old or field.startswith((f"{old}.", f"{old}[")):
            return (names[old] + field[len(old) :]).lstrip(".") or "body"
    return field


def dump_json(field: str, value: object) -> str:
    """Return the JSON text of what a body said. Raises: InvalidRequest, naming `field`."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # 1e999 is valid JSON and no number that anybody could compare with
        raise InvalidRequest(field, "has a number that is too large") from error
