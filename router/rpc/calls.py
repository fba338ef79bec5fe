"""Clients' wire requests to what the intake takes. Pure; what is cheap to check only before the
conversion is checked here, ranges are checked there."""

from collections.abc import Iterable

from core.errors import InvalidRequest
from core.service_class import ServiceClass, Slo
from protos import inference_pb2 as pb
from protos.codec import sampling_from_wire
from router.chat.messages import ChatCall, ChatMessage, Tool, ToolCall, ToolChoice, ToolChoiceMode
from router.hints import NO_HINTS, Hints, with_hints
from router.intake import ChatPrompt, GenerateCall, Prompt, TextPrompt, TokenPrompt, check_prompt_fits
from router.kv_terms import KvWish
from router.service_terms import ServiceWish

_CLASSES = {
    pb.SERVICE_CLASS_UNSPECIFIED: None,
    pb.SERVICE_CLASS_INTERACTIVE: ServiceClass.INTERACTIVE,
    pb.SERVICE_CLASS_DEADLINE: ServiceClass.DEADLINE,
    pb.SERVICE_CLASS_BATCH: ServiceClass.BATCH,
}
_TOOL_CHOICES = {
    pb.TOOL_CHOICE_MODE_UNSPECIFIED: None,
    pb.TOOL_CHOICE_MODE_AUTO: ToolChoiceMode.AUTO,
    pb.TOOL_CHOICE_MODE_NONE: ToolChoiceMode.NONE,
    pb.TOOL_CHOICE_MODE_REQUIRED: ToolChoiceMode.REQUIRED,
}
_LEVELS = {
    pb.KV_QUALITY_LEVEL_UNSPECIFIED: None,
    pb.KV_QUALITY_LEVEL_EXACT: "exact",
    pb.KV_QUALITY_LEVEL_HIGH: "high",
    pb.KV_QUALITY_LEVEL_BALANCED: "balanced",
}


def read_generate(
    request: pb.GenerateRequest, max_model_len: int, *, tenant: str, hints: Hints = NO_HINTS
) -> GenerateCall:
    """Return what the client asked for.

    Args:
        tenant: on whose account, as access control says.
        hints: what the call's metadata say, where the request says nothing.

    Raises:
        PromptTooLong: more token ids than the context holds; they are not even looked at.
        InvalidRequest: a level of quality or a service class that there is not.
    """
    return _read_call(request, _read_prompt(request, max_model_len), tenant, hints)


def read_chat(request: pb.ChatRequest, *, tenant: str, hints: Hints = NO_HINTS) -> tuple[GenerateCall, ChatCall]:
    """Return what the client asked for, and the conversation that makes the prompt of it. As `read_generate`.

    Raises:
        InvalidRequest: something that there is not is named.
    """
    call = _read_call(request, None, tenant, hints)
    chat = ChatCall(
        messages=_read_messages(request.messages),
        tools=_read_tools(request.tools),
        tool_choice=_read_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True,
        template_arguments=request.chat_template_arguments,
        constraint=call.sampling.constraint,
    )
    return call, chat


def _read_call(
    request: pb.GenerateRequest | pb.ChatRequest, prompt: Prompt | None, tenant: str, hints: Hints
) -> GenerateCall:
    sampling, terms = request.sampling, request.terms
    call = GenerateCall(
        model=request.model,
        request_id=request.request_id,
        prompt=prompt,
        sampling=sampling_from_wire(sampling),
        has_max_tokens=sampling.HasField("max_tokens"),
        has_seed=sampling.HasField("seed"),
        tenant=tenant,
        kv=KvWish(
            _read_quality(terms.kv_quality),
            terms.handoff_budget_s if terms.HasField("handoff_budget_s") else None,
        ),
        service=_read_service(terms),
        n=request.n or 1,
        resume_window_s=terms.resume_window_s if terms.HasField("resume_window_s") else None,
    )
    return with_hints(call, hints)


def read_tokenize(request: pb.TokenizeRequest) -> Prompt:
    """Raises: InvalidRequest, when there is no input."""
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            messages, tools = _read_messages(request.chat.messages), _read_tools(request.tools)
            return ChatPrompt(messages, tools, request.chat_template_arguments)
        case _:
            raise InvalidRequest("input", "is missing: set text or chat")


def _read_service(terms: pb.RequestTerms) -> ServiceWish:
    if terms.service_class not in _CLASSES:
        raise InvalidRequest("service_class", f"is the unknown class {terms.service_class}")
    slo = terms.slo
    return ServiceWish(
        _CLASSES[terms.service_class],
        terms.priority if terms.HasField("priority") else None,
        Slo(
            slo.ttft_s if slo.HasField("ttft_s") else None,
            slo.tpot_s if slo.HasField("tpot_s") else None,
            slo.deadline_s if slo.HasField("deadline_s") else None,
        ),
        terms.session_id,
    )


def _read_quality(quality: pb.KvQuality) -> str | float | None:
    match quality.WhichOneof("quality"):
        case "level":
            if quality.level not in _LEVELS:
                raise InvalidRequest("kv_quality", f"has the unknown level {quality.level}")
            return _LEVELS[quality.level]
        case "floor":
            return quality.floor
        case _:
            return None


def _read_prompt(request: pb.GenerateRequest, max_model_len: int) -> Prompt | None:
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(request.text)
        case "token_ids":
            check_prompt_fits(len(request.token_ids.ids), max_model_len)
            return TokenPrompt(tuple(request.token_ids.ids))
        case "chat":
            return ChatPrompt(_read_messages(request.chat.messages))
        case _:
            return None


def _read_messages(messages: Iterable[pb.ChatMessage]) -> tuple[ChatMessage, ...]:
    """On the wire an absent text is an empty one."""
    return tuple(
        ChatMessage(
            role=one.role,
            content=one.content or (None if one.tool_calls else ""),
            name=one.name or None,
            tool_calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in one.tool_calls),
            tool_call_id=one.tool_call_id or None,
        )
        for one in messages
    )


def _read_tools(tools: Iterable[pb.Tool]) -> tuple[Tool, ...]:
    return tuple(Tool(one.name, one.description, one.parameters, one.strict) for one in tools)


def _read_choice(choice: pb.ToolChoice) -> ToolChoice | None:
    match choice.WhichOneof("choice"):
        case "name":
            return ToolChoice(ToolChoiceMode.NAMED, choice.name)
        case "mode" if choice.mode not in _TOOL_CHOICES:
            raise InvalidRequest("tool_choice.mode", f"is the unknown mode {choice.mode}")
        case "mode":
            mode = _TOOL_CHOICES[choice.mode]
            return None if mode is None else ToolChoice(mode)
        case _:
            return None
