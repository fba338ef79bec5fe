"""JSON texts from clients: how deep they are is found before a parser recurses into them. Pure."""

import json
import re
from typing import Any

from core.errors import InvalidRequest

_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{\[]|[}\]]', re.DOTALL)


def depth_of(text: str) -> int:
    """Return how deeply objects and arrays are nested in a JSON text."""
    depth = deepest = 0
    for match in _STRUCTURE.finditer(text):
        first = match[0][0]
        if first in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif first != '"':
            depth -= 1
    return deepest


def read_object(field: str, text: str, max_depth: int) -> dict[str, Any]:
    """Return the JSON object that `text` is.

    Raises:
        InvalidRequest: naming `field`; it is no JSON, no object, has a number that JSON lacks, or is too deep.
    """
    if depth_of(text) > max_depth:
        raise InvalidRequest(field, f"is nested more than {max_depth} deep")
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(field, "must be a JSON object")
    return value


def check_object(field: str, text: str, max_depth: int) -> None:
    """Raises: InvalidRequest, as `read_object`."""
    read_object(field, text, max_depth)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
