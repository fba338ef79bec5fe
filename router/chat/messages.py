"""A conversation as any surface understood it, and the checks that need no model. Pure."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from core.constraint import Constraint
from core.errors import InvalidRequest
from router.chat.json_text import check_object

MAX_MESSAGES = 16_384
MAX_CALLS_PER_MESSAGE = 512
MAX_TOOLS = 512
MAX_ROLE_CHARACTERS = 64
MAX_NAME_CHARACTERS = 256  # of who speaks, and of a call's id
MAX_DESCRIPTION_BYTES = 65_536
MAX_PARAMETERS_BYTES = 262_144
MAX_TOOLS_CHARACTERS = 1_048_576  # of all together
MAX_TEMPLATE_ARGUMENTS_BYTES = 65_536
_PART_BYTES = 32  # that a message or tool costs besides its texts, as work
MAX_DEPTH = 64  # of a tool's schema, and of the template's arguments
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made in an earlier answer. `arguments`: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant, tool, or what else the model's chat template knows.
        content: None: there is none, as in an assistant's message of calls only.
        name: of who speaks, or of the function that a tool's message answers for.
        tool_calls: of an assistant's message.
        tool_call_id: of a tool's message: the call that it answers.
    """

    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of the arguments, as text; empty: no arguments.
        strict: the arguments are held to the schema while they are generated.
    """

    name: str
    description: str = ""
    parameters: str = ""
    strict: bool = False


class ToolChoiceMode(StrEnum):
    AUTO = "auto"  # the model decides
    NONE = "none"  # no calls
    REQUIRED = "required"  # at least one call
    NAMED = "named"  # a call of this function


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`name` only with NAMED."""

    mode: ToolChoiceMode
    name: str = ""


@dataclass(frozen=True, slots=True)
class ChatCall:
    """What a client asked of a conversation.

    Attributes:
        tool_choice: None: AUTO with tools, NONE without.
        parallel_tool_calls: False: at most one call in an answer.
        template_arguments: a JSON object of variables for the chat template, as text; empty: none.
        constraint: what the answer's text must be.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    template_arguments: str = ""
    constraint: Constraint | None = None


def check_call(call: ChatCall) -> None:
    """Raises: InvalidRequest, naming the field."""
    check_messages(call.messages)
    check_tools(call.tools)
    check_template_arguments(call.template_arguments)
    _check_choice(call)


def check_messages(messages: Sequence[ChatMessage], field: str = "messages") -> None:
    """Raises: InvalidRequest, naming `field` or a part of it."""
    if not messages:
        raise InvalidRequest(field, "must not be empty")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(field, f"has {len(messages)}, at most {MAX_MESSAGES} are allowed")
    for position, message in enumerate(messages):
        _check_message(f"{field}[{position}]", message)


def _check_message(field: str, message: ChatMessage) -> None:
    if not message.role:
        raise InvalidRequest(f"{field}.role", "must not be empty")
    if len(message.role) > MAX_ROLE_CHARACTERS:
        raise InvalidRequest(f"{field}.role", f"has at most {MAX_ROLE_CHARACTERS} characters")
    if message.name is not None and len(message.name) > MAX_NAME_CHARACTERS:
        raise InvalidRequest(f"{field}.name", f"has at most {MAX_NAME_CHARACTERS} characters")
    if message.tool_call_id is not None and len(message.tool_call_id) > MAX_NAME_CHARACTERS:
        raise InvalidRequest(f"{field}.tool_call_id", f"has at most {MAX_NAME_CHARACTERS} characters")
    if len(message.tool_calls) > MAX_CALLS_PER_MESSAGE:
        raise InvalidRequest(f"{field}.tool_calls", f"at most {MAX_CALLS_PER_MESSAGE} calls")
    for order, call in enumerate(message.tool_calls):
        if not call.name:
            raise InvalidRequest(f"{field}.tool_calls[{order}].name", "must not be empty")
        for name, text in (("name", call.name), ("id", call.id)):
            if len(text) > MAX_NAME_CHARACTERS:
                problem = f"has at most {MAX_NAME_CHARACTERS} characters"
                raise InvalidRequest(f"{field}.tool_calls[{order}].{name}", problem)


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises: InvalidRequest, naming the field."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"has {len(tools)}, at most {MAX_TOOLS} are allowed")
    num_characters = sum(len(tool.description) + len(tool.parameters) for tool in tools)
    if num_characters > MAX_TOOLS_CHARACTERS:
        raise InvalidRequest("tools", f"have {num_characters} characters, at most {MAX_TOOLS_CHARACTERS} are allowed")
    seen: set[str] = set()
    for position, tool in enumerate(tools):
        field = f"tools[{position}]"
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{field}.name", "has letters, digits, underscores and dashes, 1 to 64 of them")
        if tool.name in seen:
            raise InvalidRequest(f"{field}.name", f"{tool.name!r} is another tool's name, too")
        seen.add(tool.name)
        _check_size(f"{field}.description", tool.description, MAX_DESCRIPTION_BYTES)
        _check_size(f"{field}.parameters", tool.parameters, MAX_PARAMETERS_BYTES)
        if tool.parameters:
            check_object(f"{field}.parameters", tool.parameters, MAX_DEPTH)


def check_template_arguments(text: str) -> None:
    """Raises: InvalidRequest, naming the field."""
    _check_size("chat_template_arguments", text, MAX_TEMPLATE_ARGUMENTS_BYTES)
    if text:
        check_object("chat_template_arguments", text, MAX_DEPTH)


def _check_choice(call: ChatCall) -> None:
    choice = call.tool_choice
    if choice is None:
        return
    if (choice.mode is ToolChoiceMode.NAMED) != bool(choice.name):
        raise InvalidRequest("tool_choice", "names a function, or has a mode")
    if choice.mode is not ToolChoiceMode.NONE and not call.tools:
        raise InvalidRequest("tool_choice", f"is {choice.name or choice.mode}, but there are no tools")
    if choice.name and all(tool.name != choice.name for tool in call.tools):
        raise InvalidRequest("tool_choice", f"there is no tool {choice.name!r}")


def _check_size(field: str, text: str, max_bytes: int) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"is no valid Unicode text: {error.reason}") from error
    if num_bytes > max_bytes:
        raise InvalidRequest(field, f"has {num_bytes} bytes, at most {max_bytes} are allowed")


def tool_schema(tool: Tool) -> dict[str, object]:
    """Return the schema of a tool's arguments, which was checked."""
    if not tool.parameters:
        return {"type": "object", "properties": {}}
    schema: dict[str, object] = json.loads(tool.parameters)
    return schema


def chat_size(messages: Sequence[ChatMessage], tools: Sequence[Tool], template_arguments: str) -> int:
    """Return about how many bytes the template has to go through.

    Raises:
        InvalidRequest: something is no valid Unicode text.
    """
    texts = [template_arguments]
    for message in messages:
        texts += (message.role, message.content or "", message.name or "", message.tool_call_id or "")
        for call in message.tool_calls:
            texts += (call.id, call.name, call.arguments)
    for tool in tools:
        texts += (tool.name, tool.description, tool.parameters)
    try:
        num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise InvalidRequest("chat", f"is no valid Unicode text: {error.reason}") from error
    return num_bytes + _PART_BYTES * (len(messages) + len(tools))
