"""The gateway's public gRPC surface: Inference, Admin, grpc.health.v1 and reflection."""

import asyncio

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.errors import InvalidRequest, SlowReader
from core.ids import RequestId, WorkerId
from core.rpc import bind, create_server, reply_errors
from protos import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from router.calls import SESSION_METADATA, read_generate, read_tokenize
from router.cluster_link import ClusterLink
from router.explain.replies import decision_to_wire
from router.front import Front
from router.generation_text import GenerationText
from router.replies import delta, finished, started
from router.status import cluster_status, model_info

_INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_OVERALL = ""
_CLOSE_GRACE_S = 1.0
_EXPLAINED = 20  # decisions, when the call does not say how many


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """tandem.v1.Inference."""

    def __init__(self, front: Front) -> None:
        self._front = front

    # A coroutine that writes, not a generator: a cancelled call then runs its `finally` at once.
    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateRequest, context: "inference_pb2_grpc._ServicerContext"
    ) -> None:
        front = self._front
        patience_s = front.config.write_timeout_s
        async with reply_errors(context, patience_s=patience_s):
            call = read_generate(request, front.max_model_len(), _session_id(context))
            prepared, stream = await front.generate(call, context.time_remaining())
            try:
                text = GenerationText(front.tokenizer.decode, prepared.request)
                tokens, completion = await stream.take()
                await self._write(context, started(prepared.request, front.config.model_name))
                while True:
                    piece = text.push(tokens, completion.finish if completion else None)
                    if tokens or piece:
                        await self._write(context, delta(piece, tokens, front.tokenizer))
                    if completion is not None:
                        await self._write(context, finished(completion))
                        return
                    tokens, completion = await stream.take()
            finally:
                # Cancelled by the client, its deadline or a broken connection: both workers are told to free it.
                front.abandon(stream, "the client went away")

    async def _write(self, context: "inference_pb2_grpc._ServicerContext", message: pb.GenerateResponse) -> None:
        """Send one message. Raises: SlowReader, when the client lets it wait too long."""
        timeout_s = self._front.config.write_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await context.write(message)
        except TimeoutError as error:
            raise SlowReader(f"no message was read for {timeout_s:g} s") from error

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: "inference_pb2_grpc._ServicerContext"
    ) -> pb.AbortResponse:
        async with reply_errors(context):
            if not request.request_id:
                raise InvalidRequest("request_id", "must not be empty")
            found = self._front.abort(RequestId(request.request_id), "aborted by an Abort call")
            return pb.AbortResponse(found=found)

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: "inference_pb2_grpc._ServicerContext"
    ) -> pb.GetModelInfoResponse:
        async with reply_errors(context):
            self._front.check_model(request.model)
            return model_info(self._front)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: "inference_pb2_grpc._ServicerContext"
    ) -> pb.TokenizeResponse:
        async with reply_errors(context):
            ids = await self._front.tokenize(request.model, read_tokenize(request))
            texts = [self._front.tokenizer.token_text(one) for one in ids] if request.with_tokens else []
            return pb.TokenizeResponse(ids=ids, tokens=texts, max_model_len=self._front.max_model_len())


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """tandem.v1.Admin."""

    def __init__(self, front: Front, link: ClusterLink) -> None:
        self._front = front
        self._link = link

    async def GetClusterStatus(  # noqa: N802
        self, request: admin_pb2.GetClusterStatusRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.GetClusterStatusResponse:
        return cluster_status(self._front)

    async def ListKvDecisions(  # noqa: N802
        self, request: admin_pb2.ListClusterKvDecisionsRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.ListClusterKvDecisionsResponse:
        async with reply_errors(context):
            link, last = self._link, request.last
            if request.worker_id:
                found = [await link.list_kv_decisions(WorkerId(request.worker_id), last)]
            else:
                found = await link.list_all_kv_decisions(last)
            return admin_pb2.ListClusterKvDecisionsResponse(workers=found)

    async def ExplainRequest(  # noqa: N802
        self, request: admin_pb2.ExplainRequestRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.ExplainRequestResponse:
        front = self._front
        now = front.clock.now()
        explained = front.explain(RequestId(request.request_id), request.last or _EXPLAINED)
        decisions = [decision_to_wire(one, now) for one in explained]
        return admin_pb2.ExplainRequestResponse(gateway_id=front.gateway_id, decisions=decisions)


def _session_id(context: "inference_pb2_grpc._ServicerContext") -> str:
    for key, value in context.invocation_metadata() or ():
        if key == SESSION_METADATA and isinstance(value, str):
            return value
    return ""


class GatewayServer:
    """The gRPC server of one gateway."""

    def __init__(self, *, max_request_bytes: int) -> None:
        self._server = create_server(max_receive_bytes=max_request_bytes)
        self._health = health.aio.HealthServicer()
        self._is_serving: bool | None = None

    def bind(self, host: str, port: int) -> int:
        """Take the port (0: a free one) and return it. Raises: ConfigError."""
        return bind(self._server, host, port)

    async def start(self, front: Front, link: ClusterLink) -> None:
        """Register everything and serve."""
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(front), self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(front, link), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (_INFERENCE, _ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._health.set(_ADMIN, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(serving=False)
        await self._server.start()

    async def set_serving(self, *, serving: bool) -> None:
        """Tell health checkers whether a request could be served now."""
        if serving is self._is_serving:
            return
        self._is_serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in (_OVERALL, _INFERENCE):
            await self._health.set(name, status)

    async def drain(self) -> None:
        """All services are NOT_SERVING from now on, whatever `set_serving` says."""
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Close the port and end all calls."""
        await self._server.stop(_CLOSE_GRACE_S)
