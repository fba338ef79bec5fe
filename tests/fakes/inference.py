"""A gateway's Inference service that answers as a test says: for what a client makes of answers that real gateways give
only at bad moments."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from core.errors import RequestNotFound
from core.rpc import bind, create_server, reply_errors
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

_Context = Any  # of grpc.aio, whose type stubs know two contexts
Script = Callable[["ScriptedInference", Any, _Context], Awaitable[None]]


@dataclass(eq=False)
class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Every streaming method takes its next script; what was asked is kept."""

    generates: list[Script] = field(default_factory=list)
    chats: list[Script] = field(default_factory=list)
    resumes: list[Script] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> None:  # type: ignore[override]  # noqa: N802
        await self._run(self.generates, request, context)

    async def Chat(self, request: pb.ChatRequest, context: _Context) -> None:  # type: ignore[override]  # noqa: N802
        await self._run(self.chats, request, context)

    async def Resume(self, request: pb.ResumeRequest, context: _Context) -> None:  # type: ignore[override]  # noqa: N802
        await self._run(self.resumes, request, context)

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:  # noqa: N802
        self.aborted.append(request.request_id)
        return pb.AbortResponse(found=True)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: _Context) -> pb.GetModelInfoResponse:  # noqa: N802
        raise NotImplementedError

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:  # noqa: N802
        raise NotImplementedError

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:  # noqa: N802
        raise NotImplementedError

    async def _run(self, scripts: list[Script], request: Any, context: _Context) -> None:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        await scripts.pop(0)(self, request, context)


@asynccontextmanager
async def scripted_gateway() -> AsyncIterator[tuple[ScriptedInference, str]]:
    """Serve it; yields it and its address."""
    servicer, server = ScriptedInference(), create_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def events(*letters: str, first: int = 0, ends: bool = True) -> list[pb.GenerateResponse]:
    """A whole answer of these letters, from event number `first` on. Event 0 is the beginning."""
    found = [pb.GenerateResponse(started=pb.Started(request_id="r", model="m", seed=7, prompt_tokens=1))]
    for index, letter in enumerate(letters):
        token = pb.GeneratedToken(index=index, token_id=ord(letter))
        found.append(pb.GenerateResponse(delta=pb.TokenDelta(text=letter, tokens=[token])))
    if ends:
        found.append(pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP)))
    for number, event in enumerate(found):
        event.event_index = number
    return found[first:]


def says(*messages: Any) -> Script:
    """Send these, and end well."""

    async def script(_: ScriptedInference, request: Any, context: _Context) -> None:
        for message in messages:
            await context.write(message)

    return script


def breaks_after(*messages: Any) -> Script:
    """Send these, then break off as a connection does: a status without a word of the gateway."""

    async def script(_: ScriptedInference, request: Any, context: _Context) -> None:
        for message in messages:
            await context.write(message)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    return script


def resumed(*generated: pb.GenerateResponse) -> list[pb.ResumeResponse]:
    return [pb.ResumeResponse(generate=event) for event in generated]


async def knows_nothing(_: ScriptedInference, request: Any, context: _Context) -> None:
    """There is no such request."""
    async with reply_errors(context):
        raise RequestNotFound(f"no request {request.request_id} can be read on")
