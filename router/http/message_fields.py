"""A conversation's messages and tools in OpenAI's words."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from core.errors import InvalidRequest
from router.chat.messages import ChatMessage, Tool, ToolCall, ToolChoice, ToolChoiceMode
from router.http.fields import Items, RequestModel, dump_json

_TEXT_PARTS = ("text", "refusal")
_ROLES = {"developer": "system"}  # OpenAI's newer name; templates of open models know the older one


def _join_parts(content: object) -> object:
    """Make one text of a list of parts. The validator's caller names the place."""
    if not isinstance(content, list):
        return content
    texts = []
    for position, part in enumerate(content):
        if not isinstance(part, dict):
            raise ValueError(f"part {position} must be an object")
        kind = part.get("type")
        if kind not in _TEXT_PARTS:
            raise ValueError(f"part {position} has the type {str(kind)[:64]!r}: this model reads text only")
        text = part.get(kind)
        if not isinstance(text, str):
            raise ValueError(f"part {position} must have a string as {kind!r}")
        texts.append(text)
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"enum": list(_TEXT_PARTS)}, "text": {"type": "string"}, "refusal": {"type": "string"}},
    "required": ["type"],
}
Content = Annotated[
    str,
    BeforeValidator(_join_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]


class FunctionCallFields(RequestModel):
    name: str
    arguments: str = Field(description="JSON text")


class ToolCallFields(RequestModel):
    id: str
    type: str = "function"
    function: FunctionCallFields | None = None


class MessageFields(RequestModel):
    """One message."""

    role: str
    content: Content | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: Items[ToolCallFields] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = Field(None, description="not supported: use tool_calls")
    audio: dict[str, Any] | None = Field(None, description="not supported")


class FunctionFields(RequestModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = None


class ToolFields(RequestModel):
    """A function that the model may call."""

    type: str = "function"
    function: FunctionFields | None = None


def read_message(field: str, message: MessageFields) -> ChatMessage:
    """Raises: InvalidRequest, naming the place."""
    for name in ("function_call", "audio"):
        if getattr(message, name) is not None:
            raise InvalidRequest(f"{field}.{name}", "is not supported by this server")
    calls = []
    for position, call in enumerate(message.tool_calls or ()):
        where = f"{field}.tool_calls[{position}]"
        if call.type != "function":
            raise InvalidRequest(f"{where}.type", f"{call.type[:64]!r} is not supported: it must be 'function'")
        if call.function is None:
            raise InvalidRequest(f"{where}.function", "is missing")
        calls.append(ToolCall(call.id, call.function.name, call.function.arguments))
    if calls and message.role != "assistant":
        raise InvalidRequest(f"{field}.tool_calls", "are the assistant's")
    content = message.refusal if message.content is None else message.content
    if content is None and message.role != "assistant":
        raise InvalidRequest(f"{field}.content", "is missing")
    role = _ROLES.get(message.role, message.role)
    return ChatMessage(role, content, message.name, tuple(calls), message.tool_call_id)


def read_tool(field: str, tool: ToolFields) -> Tool:
    """Raises: InvalidRequest, naming the place."""
    if tool.type != "function":
        raise InvalidRequest(f"{field}.type", f"{tool.type[:64]!r} is not supported: it must be 'function'")
    function = tool.function
    if function is None:
        raise InvalidRequest(f"{field}.function", "is missing")
    return Tool(
        function.name,
        function.description or "",
        "" if function.parameters is None else dump_json(f"{field}.function.parameters", function.parameters),
        bool(function.strict),
    )


def read_tool_choice(choice: str | Mapping[str, Any] | None) -> ToolChoice | None:
    """Raises: InvalidRequest."""
    match choice:
        case None:
            return None
        case "auto" | "none" | "required":
            return ToolChoice(ToolChoiceMode(choice))
        case {"type": "function", "function": {"name": str(name)}} if name:
            return ToolChoice(ToolChoiceMode.NAMED, name)
        case {"type": str(kind)} if kind != "function":
            raise InvalidRequest("tool_choice.type", f"{kind[:64]!r} is not supported by this server")
        case _:
            expected = 'must be none, auto, required or {"type": "function", "function": {"name": ...}}'
            raise InvalidRequest("tool_choice", expected)
