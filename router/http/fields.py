"""What the fields of OpenAI's requests have in common: strict JSON types, and the names of what is not served.

Three kinds of fields: those that are declared in a model are served; those in an `UNSERVED` table are known to users of
such servers but not served here, and refused by name unless they say what happens anyway; all others are ignored, as
OpenAI's clients expect of a server that is older than they are."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from core.errors import InvalidRequest


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
        raise _first_problem(error) from error


def _is_same(value: object, harmless: object) -> bool:
    numbers = (int, float)
    if isinstance(value, bool) or isinstance(harmless, bool):
        return value is harmless
    if isinstance(value, numbers) and isinstance(harmless, numbers):
        return value == harmless
    return type(value) is type(harmless) and value == harmless


def _only(harmless: Sequence[object]) -> str:
    return f"; leave it out or send {' or '.join(map(repr, harmless))}" if harmless else ""


def _first_problem(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be"):
        message = "must be" + message.removeprefix("Input should be")
    elif first["type"] == "missing":
        message = "is missing"
    return InvalidRequest(path_of(first["loc"]), message)


def path_of(parts: Sequence[str | int]) -> str:
    """Write a place in a body as `messages[3].content`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "body"


def rename(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Say a field as this API calls it; the longest known beginning of its name counts.

    Returns:
        An error of the same class; `error` itself where no name applies.
    """
    for old in sorted(names, key=len, reverse=True):
        if error.field == old or error.field.startswith((f"{old}.", f"{old}[")):
            rest, new = error.field[len(old) :], names[old]
            return type(error)((new + rest).lstrip(".") or "body", error.problem)
    return error


def dump_json(field: str, value: object) -> str:
    """Return the JSON text of what a body said. Raises: InvalidRequest, naming `field`."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # 1e999 is valid JSON and no number that anybody could compare with
        raise InvalidRequest(field, "has a number that is too large") from error
