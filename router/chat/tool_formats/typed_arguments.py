"""Arguments that come one by one, not as JSON: told as the JSON object that they are, by the tool's schema. Pure."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from router.chat.json_text import depth_of
from router.chat.messages import MAX_DEPTH, tool_schema
from router.chat.reader import Take
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer

_PYTHON_WORDS = {"True": True, "False": False, "None": None}


class TypedArguments:
    """Tells the arguments of one call."""

    def __init__(self, telling: Telling, offer: Offer, name: str) -> None:
        schema: Mapping[str, Any] = {}
        for tool in offer.tools:
            if tool.name == name:
                schema = tool_schema(tool)
        properties = schema.get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, dict) else {}
        self._telling = telling
        self._num_told = 0

    def name_at(self, position: int) -> str:
        """Return the name of an argument that was given by its position."""
        names = list(self._properties)
        return names[position] if position < len(names) else f"arg{position}"

    def is_text(self, key: str) -> bool:
        """What is written for this argument is the string itself."""
        return _types(self._properties.get(key)) == {"string"}

    def begin_text(self, key: str) -> Take:
        """Begin to tell a string; returns what takes its text. `end_text` is its end."""
        self._key(key)
        self._telling.arguments('"')
        return lambda text: self._telling.arguments(_quoted(text)[1:-1])

    def end_text(self) -> None:
        self._telling.arguments('"')

    def written(self, key: str, text: str) -> None:
        """Tell a value that was written as plain text, or as JSON."""
        self._key(key)
        self._telling.arguments(_as_json(text, _types(self._properties.get(key))))

    def literal(self, key: str, text: str) -> None:
        """Tell a value that was written as a Python literal."""
        self._key(key)
        self._telling.arguments(_of_python(text))

    def end(self) -> None:
        self._telling.arguments("}" if self._num_told else "{}")
        self._telling.end_call()

    def _key(self, key: str) -> None:
        self._telling.arguments(("{" if not self._num_told else ", ") + _quoted(key) + ": ")
        self._num_told += 1


def _types(schema: Any) -> set[str]:
    """Return the JSON types that a property's schema allows; empty: it does not say."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {str(one) for one in named} if isinstance(named, list) else set()
    for keyword in ("anyOf", "oneOf"):
        alternatives = schema.get(keyword)
        for one in alternatives if isinstance(alternatives, list) else ():
            types |= _types(one)
    values = schema.get("enum")
    if not types and isinstance(values, list) and all(isinstance(one, str) for one in values):
        types = {"string"}
    return types


def _as_json(text: str, types: set[str]) -> str:
    stripped = text.strip()
    if "string" in types and not (stripped == "null" and "null" in types):
        return _quoted(text)
    if stripped in _PYTHON_WORDS:
        return json.dumps(_PYTHON_WORDS[stripped])
    if depth_of(stripped) <= MAX_DEPTH:
        try:
            json.loads(stripped, parse_constant=_refuse)
            return stripped
        except ValueError:
            pass  # it is no JSON, so it is text
    return _quoted(text)


def _of_python(text: str) -> str:
    if depth_of(text) <= MAX_DEPTH:
        try:
            return json.dumps(ast.literal_eval(text.strip()), ensure_ascii=False, allow_nan=False)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            pass  # it is no literal, or one that JSON does not know: it is text
    return _quoted(text.strip())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)
