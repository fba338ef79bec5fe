"""Schemas said in the compiler's own way, where what it makes of a keyword is not what the keyword means. Pure.

A string with a length in bounds would let raw control characters through, which no JSON text may have, and no escapes.
As a pattern over the JSON text it says what it should; an escape counts as the one character that it is.
"""

from typing import Any

# Lets bytes through that are no UTF-8, as the compiler's own strings do. A class that says what it has would not,
# and costs 70 times as much per token.
_PLAIN = r'[^"\\\x00-\x1f]'
_ESCAPE = r'\\(["\\/bfnrt]|u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}))'  # no halves of a character
_OF_SCHEMAS = ("items", "additionalProperties", "propertyNames")
_OF_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")


def rewritten(schema: Any) -> Any:
    """Return the same schema for the compiler; it passed `grammar.schemas`."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _OF_SCHEMAS:
            made[key] = rewritten(value)
        elif key in _OF_LISTS:
            made[key] = [rewritten(part) for part in value]
        elif key in _OF_NAMES:
            made[key] = {name: rewritten(part) for name, part in value.items()}
        else:
            made[key] = value
    if "minLength" in made or "maxLength" in made:
        low, high = made.pop("minLength", 0), made.pop("maxLength", "")
        made["pattern"] = f"^({_PLAIN}|{_ESCAPE}){{{low},{high}}}$"
    return made
