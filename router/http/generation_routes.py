"""`/v1/chat/completions` and `/v1/completions`: from the body to the last byte of the answer."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from core.constraint import ConstraintKind
from core.errors import InvalidRequest
from core.ids import parse_request_id
from core.request import SamplingParams
from core.service_class import NO_SLO
from router.access.principal import Principal
from router.generation.answer import Answer
from router.http.chat_reply import ChatChunks, ChatWhole
from router.http.chat_request import ChatOrder, read_chat
from router.http.completion_reply import CompletionChunks, CompletionWhole
from router.http.completion_request import CompletionOrder, read_completion
from router.http.door import Door, request_id_of
from router.http.fields import rename
from router.http.logprobs import TokenNames
from router.http.reply_head import ReplyHead, fingerprint
from router.http.sampling_fields import SamplingFields
from router.http.streaming import send_stream, send_whole
from router.http.while_connected import WhileConnected
from router.intake import GenerateCall, Prompt, TextPrompt, TokenPrompt
from router.service_terms import ServiceWish

_GONE = "the client went away"


class GenerationRoutes:
    """Answers with text."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._front = door.front

    async def chat(self, request: Request) -> Response:
        principal = await self._door.admit(request)
        order = read_chat(await self._door.body(request))
        fields = order.fields
        self._front.check_model(fields.model or "")
        session = fields.prompt_cache_key or ""
        call = self._call(request, principal, fields, order.sampling, None, order.has_max_tokens, session)
        return WhileConnected(partial(self._send_chat, order, call))

    async def completion(self, request: Request) -> Response:
        principal = await self._door.admit(request)
        order = read_completion(await self._door.body(request), self._front.config.max_choices)
        self._front.check_model(order.fields.model or "")
        calls = [
            self._call(request, principal, order.fields, order.sampling, prompt, True, "") for prompt in order.prompts
        ]
        return WhileConnected(partial(self._send_completion, order, calls))

    async def _send_chat(self, order: ChatOrder, call: GenerateCall, send: Send) -> None:
        fields = order.fields
        names = TokenNames(self._front.tokenizer, as_ids=bool(fields.return_tokens_as_token_ids))
        with _renamed(_chat_names(order)):
            answer = await self._front.chat(call, order.call, None)
            try:
                head = self._head("chatcmpl", answer.answer)
                if fields.stream:
                    await send_stream(send, answer, ChatChunks(answer.answer, head, fields, names), {})
                else:
                    await send_whole(send, answer, ChatWhole(answer.answer, head, fields, names), {})
            finally:
                answer.answer.abandon(_GONE)

    async def _send_completion(self, order: CompletionOrder, calls: list[GenerateCall], send: Send) -> None:
        fields = order.fields
        names = TokenNames(self._front.tokenizer, as_ids=bool(fields.return_tokens_as_token_ids))
        with _renamed(_completion_names(order)):
            echoes = [await self._text(prompt) for prompt in order.prompts] if fields.echo else None
            answer = await self._front.answer(calls, None)
            try:
                head = self._head("cmpl", answer)
                if fields.stream:
                    await send_stream(send, answer, CompletionChunks(answer, head, order, names, echoes), {})
                else:
                    await send_whole(send, answer, CompletionWhole(answer, head, order, names, echoes), {})
            finally:
                answer.abandon(_GONE)

    async def _text(self, prompt: TextPrompt | TokenPrompt) -> str:
        return prompt.text if isinstance(prompt, TextPrompt) else await self._front.detokenize("", prompt.token_ids)

    def _head(self, prefix: str, answer: Answer) -> ReplyHead:
        name = f"{prefix}-{answer.requests[0].request_id}"
        return ReplyHead(name, int(self._door.now()), answer.model, fingerprint(answer.provenance))

    def _call(
        self,
        request: Request,
        principal: Principal,
        fields: SamplingFields,
        sampling: SamplingParams,
        prompt: Prompt | None,
        has_max_tokens: bool,
        session_id: str,
    ) -> GenerateCall:
        service_class, priority = fields.service()
        session_id = request.headers.get("x-session-id", session_id)
        return GenerateCall(
            model=fields.model or "",
            request_id=parse_request_id(fields.request_id) if fields.request_id else request_id_of(request),
            prompt=prompt,
            sampling=sampling,
            has_max_tokens=has_max_tokens,
            has_seed=fields.seed is not None,
            tenant=principal.tenant_for(request.headers.get("x-tandem-tenant", "")),
            service=ServiceWish(service_class, priority, NO_SLO, session_id),
            n=fields.num_choices,
        )


@contextlib.contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Say fields as the client called them."""
    try:
        yield
    except InvalidRequest as error:
        renamed = rename(error, names)
        if renamed is error:
            raise
        raise renamed from error


def _chat_names(order: ChatOrder) -> dict[str, str]:
    names = {
        "sampling": "",
        "sampling.logprobs": "top_logprobs",
        "sampling.max_tokens": order.max_tokens_field,
        "chat": "messages",
        "chat.messages": "messages",
        "chat_template_arguments": "chat_template_kwargs",
    }
    return names | _constraint_names(order.constraint_field or "tools")


def _completion_names(order: CompletionOrder) -> dict[str, str]:
    names = {"sampling": "", "text": "prompt", "token_ids": "prompt"}
    return names | _constraint_names(order.constraint_field)


def _constraint_names(field: str) -> dict[str, str]:
    names = ["sampling.constraint", *(f"sampling.constraint.{kind}" for kind in ConstraintKind)]
    return dict.fromkeys(names, field)
