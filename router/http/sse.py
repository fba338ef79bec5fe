"""JSON texts and server-sent events. Pure."""

import json
from typing import Any

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""JSON in one line of ASCII."""

DONE_WORD = "[DONE]"
DONE = f"data: {DONE_WORD}\n\n"


def event(text: str) -> str:
    """One event of one line."""
    return f"data: {text}\n\n"


def json_event(value: Any) -> str:
    return event(encode(value))
