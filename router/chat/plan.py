"""How one chat call is served: what the template gets, what the text is held to, how calls are read out of it. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.constraint import Constraint, ConstraintKind
from core.errors import InvalidRequest
from router.chat.messages import ChatCall, ToolChoice, ToolChoiceMode, check_call
from router.chat.style import ChatStyle
from router.chat.tool_formats.bare_json import JSON
from router.chat.tool_formats.format import Offer, Structure, ToolFormat
from router.chat.tool_formats.structure import MAX_WHITESPACE, either
from router.intake import ChatPrompt

_AUTO = ToolChoice(ToolChoiceMode.AUTO)
_NONE = ToolChoice(ToolChoiceMode.NONE)


@dataclass(frozen=True, slots=True)
class ToolReading:
    """How calls are read out of the text.

    Attributes:
        max_calls: None: no bound.
        is_forced: the text is calls and nothing else.
    """

    tool_format: ToolFormat
    offer: Offer
    max_calls: int | None
    is_forced: bool


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """The way from a chat call to its answer's message.

    Attributes:
        prompt: for the intake.
        constraint: for the sampling parameters: the client's own, what forces a call, or both in one.
        tools: None: all text is content.
        spoken_tokens: special tokens that must be in the text, by id.
    """

    prompt: ChatPrompt
    constraint: Constraint | None = None
    tools: ToolReading | None = None
    spoken_tokens: Mapping[int, str] = field(default_factory=dict)


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
    if not style.shows_tools:
        raise InvalidRequest("tools", "this model's chat template knows no tools")
    prompt = ChatPrompt(call.messages, call.tools, call.template_arguments)
    if choice.mode is ToolChoiceMode.AUTO:
        if style.tool_format is None:
            raise InvalidRequest("tools", "how this model writes calls is not known here; tool_choice can force one")
        tool_format = style.tool_format
        offer = Offer(call.tools, call.parallel_tool_calls, style.special_marks(tool_format))
        constraint = _free(tool_format, offer, call.constraint)
    else:
        if call.constraint is not None:
            raise InvalidRequest("tool_choice", "forces a call, so the answer cannot be held to another form, too")
        is_named = choice.mode is ToolChoiceMode.NAMED
        tools = tuple(tool for tool in call.tools if not is_named or tool.name == choice.name)
        tool_format = style.tool_format if style.tool_format is not None else JSON
        offer = Offer(tools, call.parallel_tool_calls and not is_named, style.special_marks(tool_format))
        structure = tool_format.forced(offer)
        if structure is None:  # what this format writes has no grammar: plain JSON instead
            tool_format, structure = JSON, JSON.forced(offer)
        constraint = _tag(structure)
    spoken = {token_id: mark for mark, token_id in style.special_marks(tool_format).items()}
    is_forced = choice.mode is not ToolChoiceMode.AUTO
    reading = ToolReading(tool_format, offer, None if offer.is_parallel else 1, is_forced)
    return ChatPlan(prompt, constraint, reading, spoken)


def _free(tool_format: ToolFormat, offer: Offer, constraint: Constraint | None) -> Constraint | None:
    """The model may call or answer; either is held to what was asked for it."""
    if constraint is None:
        is_strict = any(tool.strict for tool in offer.tools)
        structure = tool_format.guided(offer) if is_strict else None
        return _tag(structure) if structure is not None else None
    forced = tool_format.forced(offer)
    if forced is None or constraint.kind is ConstraintKind.STRUCTURAL_TAG:
        problem = "the answer cannot be held to a form while the model may call tools; set tool_choice"
        raise InvalidRequest("tools", problem)
    return _tag(either([forced, *_of_constraint(constraint)]))


def _of_constraint(constraint: Constraint) -> list[Structure]:
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return [_json({"type": "object"})]
        case ConstraintKind.JSON_SCHEMA:
            return [_json(_read(constraint.text))]
        case ConstraintKind.REGEX:
            return [{"type": "regex", "pattern": constraint.text}]
        case ConstraintKind.CHOICE:
            return [{"type": "const_string", "value": one} for one in _read(constraint.text)]
        case ConstraintKind.GRAMMAR:
            return [{"type": "grammar", "grammar": constraint.text}]
        case ConstraintKind.STRUCTURAL_TAG:
            raise AssertionError("cannot be a part of another")


def _json(schema: Any) -> Structure:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("sampling.constraint", f"is not JSON: {error}") from error


def _tag(structure: Structure) -> Constraint:
    whole = {"type": "structural_tag", "format": structure}
    return Constraint(ConstraintKind.STRUCTURAL_TAG, json.dumps(whole, ensure_ascii=False))
