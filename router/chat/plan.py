"""How one chat call is served: what the template gets, what the text is held to, how calls are read out of it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from core.constraint import Constraint
from core.errors import InvalidRequest
from router.chat.messages import ChatCall, ToolChoice, ToolChoiceMode, check_call
from router.chat.style import ChatStyle
from router.chat.tool_formats.format import ToolFormat
from router.intake import ChatPrompt

_AUTO = ToolChoice(ToolChoiceMode.AUTO)
_NONE = ToolChoice(ToolChoiceMode.NONE)


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """The way from a chat call to its answer's message.

    Attributes:
        prompt: for the intake.
        constraint: for the sampling parameters: the client's own, or what forces a call.
        tool_format: reads calls out of the text; None: all text is content.
        spoken_tokens: special tokens that the format must see, by id; they are put into the text at their place.
        max_calls: further calls are left out.
        known_names: of the tools.
    """

    prompt: ChatPrompt
    constraint: Constraint | None = None
    tool_format: ToolFormat | None = None
    spoken_tokens: Mapping[int, str] | None = None
    max_calls: int | None = None
    known_names: frozenset[str] = frozenset()


def plan_chat(call: ChatCall, style: ChatStyle) -> ChatPlan:
    """Check a call and plan it.

    Raises:
        InvalidRequest: naming the field; the template is only asked when the prompt is made.
    """
    check_call(call)
    if not style.has_template:
        raise InvalidRequest("messages", "this model has no chat template; send text or token ids")
    choice = call.tool_choice or (_AUTO if call.tools else _NONE)
    if choice.mode is ToolChoiceMode.NONE:
        # The model is not shown what it must not call.
        return ChatPlan(ChatPrompt(call.messages, (), call.template_arguments), call.constraint)
    raise InvalidRequest("tools", "this model's chat template knows no tools")
