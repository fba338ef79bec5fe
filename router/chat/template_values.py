"""Messages and tools as chat templates of the field expect them: plain mappings, in the form of OpenAI's API. Pure."""

import json
import re
from collections.abc import Sequence
from typing import Any

from router.chat.json_text import depth_of
from router.chat.messages import MAX_DEPTH, ChatMessage, Tool, tool_schema

_ASKS_FOR_NONE = re.compile(r"""content['"]?\s*\]?\s+is\s+(?:not\s+)?none""", re.IGNORECASE)


class Arguments(dict[str, Any]):
    """A call's arguments: a mapping that is also its JSON text, as the model wrote it.

    Templates disagree: most take a mapping and write it with `tojson`, others add the text to a string.
    """

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def asks_for_none(template: str) -> bool:
    """Return whether a template tells calls without content by `none`; others would write the word, or fail."""
    return _ASKS_FOR_NONE.search(template) is not None


def template_messages(messages: Sequence[ChatMessage], *, with_none: bool) -> list[dict[str, Any]]:
    """`with_none`: content that there is not is None beside calls; it is empty otherwise."""
    return [_message(message, with_none) for message in messages]


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """None without tools: templates ask for that."""
    return [_tool(tool) for tool in tools] or None


def _message(message: ChatMessage, with_none: bool) -> dict[str, Any]:
    content = message.content or (None if with_none and message.tool_calls else "")
    values: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        values["name"] = message.name
    if message.tool_call_id is not None:
        values["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        values["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return values


def _arguments(text: str) -> Arguments | str:
    """What a model wrote is not always JSON, and must not end the conversation: then it stays the text that it is."""
    if not text.strip():
        return Arguments({}, "{}")
    if depth_of(text) > MAX_DEPTH:
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return text
    return Arguments(values, text) if isinstance(values, dict) else text


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": tool_schema(tool)}}
