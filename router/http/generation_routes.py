"""`/v1/chat/completions` and `/v1/completions`: from the body to the last byte of the answer."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from core.constraint import ConstraintKind
from core.errors import InvalidRequest
from core.ids import parse_request_id
from core.request import SamplingParams
from router.access.principal import Principal
from router.generation.answer import Answer
from router.generation.metadata import response_headers
from router.generation.pieces import Pieces
from router.hints import RESUME_WINDOW_S, Hints, read_hints, with_hints
from router.http.chat_reply import ChatChunks, ChatWhole
from router.http.chat_request import ChatOrder, read_chat
from router.http.completion_reply import CompletionChunks, CompletionWhole
from router.http.completion_request import CompletionOrder, read_completion
from router.http.door import Door
from router.http.fields import rename
from router.http.logprobs import TokenNames
from router.http.reply_head import ReplyHead, fingerprint
from router.http.resuming import batches, send_followed
from router.http.sampling_fields import SamplingFields
from router.http.streaming import Chunks, Whole, send_stream, send_whole
from router.http.while_connected import WhileConnected
from router.intake import GenerateCall, Prompt, TextPrompt, TokenPrompt
from router.resume.events import StreamKey, StreamKind
from router.service_terms import ServiceWish

_GONE = "the client went away"
T = TypeVar("T")


class GenerationRoutes:
    """Answers with text."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._front = door.front

    async def chat(self, request: Request) -> Response:
        principal = await self._door.admit(request)
        order = read_chat(await self._door.body(request), self._front.tokenizer.has_template_variable)
        self._front.check_model(order.fields.model or "")
        hints = read_hints(request.headers.items())
        call = self._call(request, principal, hints, order.fields, order.sampling, None)
        call = replace(call, has_max_tokens=order.has_max_tokens)
        return WhileConnected(partial(self._send_chat, order, call))

    async def completion(self, request: Request) -> Response:
        principal = await self._door.admit(request)
        order = read_completion(await self._door.body(request), self._front.config.max_choices)
        self._front.check_model(order.fields.model or "")
        hints = read_hints(request.headers.items())
        calls = [
            self._call(request, principal, hints, order.fields, order.sampling, prompt) for prompt in order.prompts
        ]
        return WhileConnected(partial(self._send_completion, order, calls))

    async def _send_chat(self, order: ChatOrder, call: GenerateCall, send: Send) -> None:
        fields = order.fields
        names = TokenNames(self._front.tokenizer, as_ids=bool(fields.return_tokens_as_token_ids))
        with _renamed(_chat_names(order)):
            window_s = self._window(call, fields)
            chat = await self._front.chat(call, order.call, None)
            answer = chat.answer
            head = self._head("chatcmpl", answer)
            if fields.stream:
                await self._stream(send, chat, answer, ChatChunks(answer, head, fields, names), window_s)
            else:
                await self._whole(send, chat, answer, ChatWhole(answer, head, fields, names))

    async def _send_completion(self, order: CompletionOrder, calls: list[GenerateCall], send: Send) -> None:
        fields = order.fields
        names = TokenNames(self._front.tokenizer, as_ids=bool(fields.return_tokens_as_token_ids))
        with _renamed(_completion_names(order)):
            window_s = self._window(calls[0], fields)
            echoes = [await self._text(prompt) for prompt in order.prompts] if fields.echo else None
            answer = await self._front.answer(calls, None)
            head = self._head("cmpl", answer)
            if fields.stream:
                chunks = CompletionChunks(answer, head, order, names, echoes)
                await self._stream(send, answer, answer, chunks, window_s)
            else:
                await self._whole(send, answer, answer, CompletionWhole(answer, head, order, names, echoes))

    def _window(self, call: GenerateCall, fields: SamplingFields) -> float:
        """Return for how long the answer may outlive its connection; 0: not at all.

        Raises:
            InvalidRequest, RejectedError
        """
        window_s = self._front.resumables.window(call.resume_window_s)
        if window_s and not fields.stream:
            raise InvalidRequest(RESUME_WINDOW_S[0], "is for streams: set stream to true")
        return window_s

    async def _stream(self, send: Send, reader: Pieces[T], answer: Answer, chunks: Chunks[T], window_s: float) -> None:
        headers = partial(response_headers, answer)
        if window_s:
            request = answer.requests[0]
            key, told = StreamKey(request.tenant, request.request_id), batches(reader, chunks)
            follower = self._front.resumables.open(key, StreamKind.SSE, window_s, told, answer.abort)
            await send_followed(send, follower, headers)
            return
        try:
            await send_stream(send, reader, chunks, headers)
        finally:
            answer.abandon(_GONE)

    async def _whole(self, send: Send, reader: Pieces[T], answer: Answer, whole: Whole[T]) -> None:
        try:
            await send_whole(send, reader, whole, partial(response_headers, answer))
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
        hints: Hints,
        fields: SamplingFields,
        sampling: SamplingParams,
        prompt: Prompt | None,
    ) -> GenerateCall:
        service_class, priority = fields.service()
        call = GenerateCall(
            model=fields.model or "",
            request_id=parse_request_id(fields.request_id) if fields.request_id else "",
            prompt=prompt,
            sampling=sampling,
            has_max_tokens=True,
            has_seed=fields.seed is not None,
            tenant=principal.tenant_for(hints.tenant),
            service=ServiceWish(service_class, priority),
            n=fields.num_choices,
        )
        call = with_hints(call, hints)
        service = replace(call.service, session_id=call.service.session_id or fields.prompt_cache_key or "")
        return replace(call, service=service, request_id=call.request_id or request.state.request_id)


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
        "resume_window_s": RESUME_WINDOW_S[0],
        "sampling.logprobs": "top_logprobs",
        "sampling.max_tokens": order.fields.max_tokens_field,
        "chat": "messages",
        "chat.messages": "messages",
        "chat_template_arguments": "chat_template_kwargs",
    }
    return names | _constraint_names(order.constraint_field or "tools")


def _completion_names(order: CompletionOrder) -> dict[str, str]:
    names = {
        "sampling": "",
        "sampling.max_tokens": order.fields.max_tokens_field,
        "resume_window_s": RESUME_WINDOW_S[0],
        "text": "prompt",
        "token_ids": "prompt",
    }
    return names | _constraint_names(order.constraint_field)


def _constraint_names(field: str) -> dict[str, str]:
    names = ["sampling.constraint", *(f"sampling.constraint.{kind}" for kind in ConstraintKind)]
    return dict.fromkeys(names, field)
