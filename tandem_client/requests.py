"""Calls to wire messages. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import InvalidRequest
from protos import inference_pb2 as pb
from protos.codec import constraint_to_wire
from tandem_client.options import ChatOptions, Options, Sampling
from tandem_client.types import Message, NamedTool, Service, Tool, ToolChoice

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat."""

_LEVELS = {
    "exact": pb.KV_QUALITY_LEVEL_EXACT,
    "high": pb.KV_QUALITY_LEVEL_HIGH,
    "balanced": pb.KV_QUALITY_LEVEL_BALANCED,
}
_CLASSES = {
    "": pb.SERVICE_CLASS_UNSPECIFIED,
    "interactive": pb.SERVICE_CLASS_INTERACTIVE,
    "deadline": pb.SERVICE_CLASS_DEADLINE,
    "batch": pb.SERVICE_CLASS_BATCH,
}
_TOOL_CHOICES = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
_ANY_SERVICE = Service()


def generate_request(prompt: Prompt, options: Options, *, n: int, tenant: str) -> pb.GenerateRequest:
    """Raises: InvalidRequest, for values that the wire has no room for."""
    try:
        request = pb.GenerateRequest(
            model=options.get("model", ""),
            request_id=options.get("request_id", ""),
            sampling=_sampling(options),
            n=n,
            terms=_terms(options, tenant),
        )
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], tuple):
            request.chat.messages.extend(messages_to_wire([one for one in prompt if isinstance(one, tuple)]))
        else:
            request.token_ids.ids.extend(one for one in prompt if isinstance(one, int))
            request.token_ids.SetInParent()
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", f"cannot be sent: {error}") from error
    return request


def chat_request(messages: Sequence[Message], options: ChatOptions, *, n: int, tenant: str) -> pb.ChatRequest:
    """Raises: InvalidRequest, for values that the wire has no room for."""
    arguments = options.get("template_arguments")
    try:
        return pb.ChatRequest(
            model=options.get("model", ""),
            request_id=options.get("request_id", ""),
            messages=messages_to_wire(messages),
            tools=tools_to_wire(options.get("tools", ())),
            tool_choice=_tool_choice(options.get("tool_choice")),
            parallel_tool_calls=options.get("parallel_tool_calls"),
            sampling=_sampling(options),
            n=n,
            terms=_terms(options, tenant),
            chat_template_arguments=json.dumps(arguments) if arguments else "",
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", f"cannot be sent: {error}") from error


def tokenize_request(
    prompt: str | Sequence[Message], model: str, tools: Sequence[Tool], template_arguments: Mapping[str, Any] | None
) -> pb.TokenizeRequest:
    """Raises: InvalidRequest, for values that the wire has no room for."""
    try:
        request = pb.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.messages.extend(messages_to_wire(prompt))
            request.chat.SetInParent()
            request.tools.extend(tools_to_wire(tools))
            request.chat_template_arguments = json.dumps(template_arguments) if template_arguments else ""
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", f"cannot be sent: {error}") from error
    return request


def messages_to_wire(messages: Sequence[Message]) -> list[pb.ChatMessage]:
    return [
        pb.ChatMessage(
            role=one.role,
            content=one.content,
            name=one.name,
            tool_calls=[pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in one.tool_calls],
            tool_call_id=one.tool_call_id,
        )
        for one in (Message(*message) for message in messages)  # plain tuples are welcome
    ]


def tools_to_wire(tools: Sequence[Tool]) -> list[pb.Tool]:
    return [
        pb.Tool(
            name=one.name,
            description=one.description,
            parameters=json.dumps(one.parameters) if one.parameters is not None else "",
            strict=one.strict,
        )
        for one in tools
    ]


def _sampling(options: Options) -> pb.SamplingParams:
    given: dict[str, Any] = {name: options[name] for name in Sampling.__annotations__ if name in options}  # type: ignore[literal-required]
    constraint = constraint_to_wire(given.pop("constraint", None))
    return pb.SamplingParams(**given, constraint=constraint)


def _terms(options: Options, tenant: str) -> pb.RequestTerms:
    service = options.get("service", _ANY_SERVICE)
    return pb.RequestTerms(
        kv_quality=_quality(options.get("kv_quality")),
        handoff_budget_s=options.get("handoff_budget_s"),
        tenant=tenant,
        service_class=_service_class(service.service_class),
        priority=service.priority,
        slo=_slo(service),
        session_id=service.session_id,
        resume_window_s=options.get("resume_window_s"),
    )


def _tool_choice(wanted: ToolChoice | None) -> pb.ToolChoice | None:
    if wanted is None:
        return None
    if isinstance(wanted, NamedTool):
        return pb.ToolChoice(name=wanted.name)
    if wanted not in _TOOL_CHOICES:
        raise InvalidRequest("tool_choice", f"must be a NamedTool or one of {', '.join(_TOOL_CHOICES)}, got {wanted!r}")
    return pb.ToolChoice(mode=_TOOL_CHOICES[wanted])


def _quality(wanted: str | float | None) -> pb.KvQuality | None:
    if wanted is None:
        return None
    if not isinstance(wanted, str):
        return pb.KvQuality(floor=wanted)
    if wanted not in _LEVELS:
        raise InvalidRequest("kv_quality", f"must be a number or one of {', '.join(_LEVELS)}, got {wanted!r}")
    return pb.KvQuality(level=_LEVELS[wanted])


def _service_class(wanted: str) -> pb.ServiceClass.ValueType:
    if wanted not in _CLASSES:
        raise InvalidRequest("service_class", f"must be one of {', '.join(filter(None, _CLASSES))}, got {wanted!r}")
    return _CLASSES[wanted]


def _slo(service: Service) -> pb.Slo | None:
    targets = {"ttft_s": service.ttft_s, "tpot_s": service.tpot_s, "deadline_s": service.deadline_s}
    return pb.Slo(**targets) if any(target is not None for target in targets.values()) else None
