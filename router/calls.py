"""Clients' wire requests to what the intake takes. Pure; ranges are checked there."""

from core.errors import InvalidRequest
from protos import inference_pb2 as pb
from protos.codec import sampling_from_wire
from router.intake import ChatPrompt, GenerateCall, Prompt, TextPrompt, TokenPrompt
from router.tokenizer import ChatTurn


def read_generate(request: pb.GenerateRequest) -> GenerateCall:
    """Raises: InvalidRequest, for a prompt of a kind that is not known."""
    sampling = request.sampling
    return GenerateCall(
        model=request.model,
        request_id=request.request_id,
        prompt=_read_prompt(request),
        sampling=sampling_from_wire(sampling),
        has_max_tokens=sampling.HasField("max_tokens"),
        has_seed=sampling.HasField("seed"),
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


def _read_prompt(request: pb.GenerateRequest) -> Prompt | None:
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(request.text)
        case "token_ids":
            return TokenPrompt(tuple(request.token_ids.ids))
        case "chat":
            return _read_chat(request.chat)
        case _:
            return None


def _read_chat(chat: pb.ChatMessages) -> ChatPrompt:
    return ChatPrompt(tuple(ChatTurn(message.role, message.content) for message in chat.messages))
