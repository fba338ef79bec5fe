"""Clients' wire requests to what the intake takes. Pure; what is cheap to check only before the
conversion is checked here, ranges are checked there."""

from core.errors import InvalidRequest
from core.service_class import ServiceClass, Slo
from protos import inference_pb2 as pb
from protos.codec import sampling_from_wire
from router.chat.messages import ChatMessage
from router.intake import ChatPrompt, GenerateCall, Prompt, TextPrompt, TokenPrompt, check_prompt_fits
from router.kv_terms import KvWish
from router.service_terms import ServiceWish

SESSION_METADATA = "x-session-id"
_CLASSES = {
    pb.SERVICE_CLASS_UNSPECIFIED: None,
    pb.SERVICE_CLASS_INTERACTIVE: ServiceClass.INTERACTIVE,
    pb.SERVICE_CLASS_DEADLINE: ServiceClass.DEADLINE,
    pb.SERVICE_CLASS_BATCH: ServiceClass.BATCH,
}
_LEVELS = {
    pb.KV_QUALITY_LEVEL_UNSPECIFIED: None,
    pb.KV_QUALITY_LEVEL_EXACT: "exact",
    pb.KV_QUALITY_LEVEL_HIGH: "high",
    pb.KV_QUALITY_LEVEL_BALANCED: "balanced",
}


def read_generate(
    request: pb.GenerateRequest, max_model_len: int, *, tenant: str, session_id: str = ""
) -> GenerateCall:
    """Return what the client asked for.

    Args:
        tenant: on whose account, as access control says.
        session_id: what the call's metadata say, if the request does not.

    Raises:
        PromptTooLong: more token ids than the context holds; they are not even looked at.
        InvalidRequest: a level of quality or a service class that there is not.
    """
    sampling, terms = request.sampling, request.terms
    return GenerateCall(
        model=request.model,
        request_id=request.request_id,
        prompt=_read_prompt(request, max_model_len),
        sampling=sampling_from_wire(sampling),
        has_max_tokens=sampling.HasField("max_tokens"),
        has_seed=sampling.HasField("seed"),
        tenant=tenant,
        kv=KvWish(
            _read_quality(terms.kv_quality),
            terms.handoff_budget_s if terms.HasField("handoff_budget_s") else None,
        ),
        service=_read_service(terms, session_id),
        n=request.n or 1,
        resume_window_s=terms.resume_window_s if terms.HasField("resume_window_s") else None,
    )


def read_tokenize(request: pb.TokenizeRequest) -> Prompt:
    """Raises: InvalidRequest, when there is no input."""
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            return _read_chat(request.chat)
        case _:
            raise InvalidRequest("input", "is missing: set text or chat")


def _read_service(terms: pb.RequestTerms, session_id: str) -> ServiceWish:
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
        terms.session_id or session_id,
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
            return _read_chat(request.chat)
        case _:
            return None


def _read_chat(chat: pb.ChatMessages) -> ChatPrompt:
    return ChatPrompt(tuple(ChatMessage(message.role, message.content) for message in chat.messages))
