"""tandem.v1.Inference."""

from typing import TYPE_CHECKING

from core.errors import InvalidRequest
from core.ids import parse_request_id, parse_tenant
from core.rpc import reply_errors
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from router.access.principal import current_principal
from router.front import Front
from router.generation.answer import Answer
from router.hints import Hints, read_hints
from router.resume.events import StreamKey, StreamKind
from router.rpc.calls import read_chat, read_generate, read_tokenize
from router.rpc.field_names import message_paths
from router.rpc.replies import ChatEvents, GenerateEvents
from router.rpc.resuming import RESUMED, batches, follow
from router.rpc.status import model_info
from router.rpc.writing import stream

if TYPE_CHECKING:
    from protos.inference_pb2_grpc import _ServicerContext


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """What clients call."""

    def __init__(self, front: Front) -> None:
        self._front = front

    # A coroutine that writes, not a generator: a cancelled call then runs its `finally` at once.
    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateRequest, context: "_ServicerContext"
    ) -> None:
        front = self._front
        patience_s = front.config.write_timeout_s
        async with reply_errors(context, patience_s=patience_s):
            hints = _hints(context)
            tenant = current_principal().tenant_for(request.terms.tenant or hints.tenant)
            with message_paths():
                call = read_generate(request, front.max_model_len(), tenant=tenant, hints=hints)
                window_s = front.resumables.window(call.resume_window_s)
                answer = await front.answer([call], context.time_remaining())
            events = GenerateEvents(answer, front.tokenizer)
            if not window_s:
                await stream(context, answer, events, patience_s)
                return
            told = batches(answer, events)
            follower = front.resumables.open(_key_of(answer), StreamKind.GENERATE, window_s, told, answer.abort)
            await follow(context, follower, pb.GenerateResponse.FromString, patience_s)

    async def Chat(  # type: ignore[override]  # noqa: N802
        self, request: pb.ChatRequest, context: "_ServicerContext"
    ) -> None:
        front = self._front
        patience_s = front.config.write_timeout_s
        async with reply_errors(context, patience_s=patience_s):
            hints = _hints(context)
            tenant = current_principal().tenant_for(request.terms.tenant or hints.tenant)
            with message_paths():
                call, chat = read_chat(request, tenant=tenant, hints=hints)
                window_s = front.resumables.window(call.resume_window_s)
                answer = await front.chat(call, chat, context.time_remaining())
            events = ChatEvents(answer, front.tokenizer)
            if not window_s:
                await stream(context, answer, events, patience_s)
                return
            told, key = batches(answer, events), _key_of(answer.answer)
            follower = front.resumables.open(key, StreamKind.CHAT, window_s, told, answer.answer.abort)
            await follow(context, follower, pb.ChatResponse.FromString, patience_s)

    async def Resume(  # type: ignore[override]  # noqa: N802
        self, request: pb.ResumeRequest, context: "_ServicerContext"
    ) -> None:
        front = self._front
        patience_s = front.config.write_timeout_s
        async with reply_errors(context, patience_s=patience_s):
            tenant = current_principal().tenant_for(request.tenant or _hints(context).tenant)
            key = StreamKey(parse_tenant(tenant), parse_request_id(request.request_id))
            after = request.last_event_index if request.HasField("last_event_index") else None
            kind, follower = await front.resumables.follow(key, after)
            if kind not in RESUMED:
                follower.close()
                raise InvalidRequest("request_id", "its stream began over HTTP: GET /v1/streams/<request id> goes on")
            await follow(context, follower, RESUMED[kind], patience_s)

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: "_ServicerContext"
    ) -> pb.AbortResponse:
        async with reply_errors(context):
            if not request.request_id:
                raise InvalidRequest("request_id", "must not be empty")
            tenant = current_principal().tenant_for(request.tenant or _hints(context).tenant)
            found = await self._front.abort(request.request_id, "aborted by an Abort call", tenant=tenant)
            return pb.AbortResponse(found=found)

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: "_ServicerContext"
    ) -> pb.GetModelInfoResponse:
        async with reply_errors(context):
            self._front.check_model(request.model)
            return model_info(self._front)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: "_ServicerContext"
    ) -> pb.TokenizeResponse:
        async with reply_errors(context):
            ids = await self._front.tokenize(request.model, read_tokenize(request))
            texts = [self._front.tokenizer.token_text(one) for one in ids] if request.with_tokens else []
            return pb.TokenizeResponse(ids=ids, tokens=texts, max_model_len=self._front.max_model_len())

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: "_ServicerContext"
    ) -> pb.DetokenizeResponse:
        async with reply_errors(context):
            return pb.DetokenizeResponse(text=await self._front.detokenize(request.model, request.ids))


def _key_of(answer: Answer) -> StreamKey:
    request = answer.requests[0]
    return StreamKey(request.tenant, request.request_id)


def _hints(context: "_ServicerContext") -> Hints:
    return read_hints((key, value) for key, value in context.invocation_metadata() or ())
