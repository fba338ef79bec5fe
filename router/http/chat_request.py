"""`/v1/chat/completions`: a body to a call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from core.constraint import Constraint
from core.errors import InvalidRequest
from core.request import MAX_LOGPROBS, SamplingParams
from router.chat.messages import ChatCall
from router.http.fields import Integer, Items, TextOrObject, dump_json, read_fields
from router.http.message_fields import MessageFields, ToolFields, read_message, read_tool, read_tool_choice
from router.http.sampling_fields import UNSERVED, SamplingFields, check_alternatives

UNSERVED_CHAT: Mapping[str, Sequence[object]] = {
    **UNSERVED,
    "prompt": (),
    "echo": (False,),
    "add_special_tokens": (False,),
}
_EFFORT, _NO_EFFORT = "reasoning_effort", "none"


class ChatRequest(SamplingFields):
    """A conversation whose next message is wanted."""

    messages: Items[MessageFields] = Field(json_schema_extra={"minItems": 1})
    tools: Items[ToolFields] | None = None
    tool_choice: TextOrObject | None = Field(None, description="none, auto, required, or a function by name")
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, json_schema_extra={"minimum": 0, "maximum": MAX_LOGPROBS})
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")
    reasoning_effort: str | None = Field(None, description="handed to the chat template as a variable")


@dataclass(frozen=True, slots=True)
class ChatOrder:
    """What a chat body asks for."""

    fields: ChatRequest
    call: ChatCall
    sampling: SamplingParams
    constraint_field: str

    @property
    def has_max_tokens(self) -> bool:
        return self.fields.most_tokens() is not None


def read_chat(body: Mapping[str, Any], has_variable: Callable[[str], bool]) -> ChatOrder:
    """
    Args:
        has_variable: whether the model's chat template reads a variable.

    Raises:
        InvalidRequest: naming the field.
    """
    fields = read_fields(ChatRequest, body, UNSERVED_CHAT)
    fields.check_delivery()
    constraint, constraint_field = fields.constraint()
    call = ChatCall(
        messages=tuple(read_message(f"messages[{index}]", one) for index, one in enumerate(fields.messages)),
        tools=tuple(read_tool(f"tools[{index}]", one) for index, one in enumerate(fields.tools or ())),
        tool_choice=read_tool_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        template_arguments=_template_arguments(fields, has_variable),
        constraint=constraint,
    )
    return ChatOrder(fields, call, _sampling(fields, constraint), constraint_field)


def _sampling(fields: ChatRequest, constraint: Constraint | None) -> SamplingParams:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs", "is only allowed when logprobs is true")
    check_alternatives("top_logprobs", fields.top_logprobs)
    check_alternatives("prompt_logprobs", fields.prompt_logprobs)
    return fields.sampling(
        max_tokens=fields.most_tokens(),
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        prompt_logprobs=fields.prompt_logprobs,
        constraint=constraint,
    )


def _template_arguments(fields: ChatRequest, has_variable: Callable[[str], bool]) -> str:
    arguments = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        if not has_variable(_EFFORT) and fields.reasoning_effort != _NO_EFFORT:
            raise InvalidRequest(_EFFORT, "is not supported: this model's chat template does not read it")
        arguments.setdefault(_EFFORT, fields.reasoning_effort)
    return dump_json("chat_template_kwargs", arguments) if arguments else ""
