"""The gRPC server of one gateway: its services, their health, reflection."""

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.rpc import bind, create_server
from core.tls import ServerTls
from protos import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from router.access.service import AccessControl
from router.cluster_link import ClusterLink
from router.front import Front
from router.rpc.access import AccessInterceptor
from router.rpc.admin import AdminServicer
from router.rpc.decoding import DecodingInterceptor
from router.rpc.inference import InferenceServicer

_INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_OVERALL = ""
_CLOSE_GRACE_S = 1.0


class GatewayServer:
    """The gRPC server of one gateway."""

    def __init__(self, access: AccessControl, *, max_request_bytes: int, share_port: bool = False) -> None:
        # Who calls is asked before what they sent is looked at.
        interceptors = [AccessInterceptor(access.gatekeeper, access.audit), DecodingInterceptor()]
        self._server = create_server(
            max_receive_bytes=max_request_bytes, interceptors=interceptors, share_port=share_port
        )
        self._access = access
        self._health = health.aio.HealthServicer()
        self._is_serving: bool | None = None

    def bind(self, host: str, port: int, tls: ServerTls | None = None) -> int:
        """Take the port (0: a free one) and return it. Raises: ConfigError."""
        return bind(self._server, host, port, tls)

    async def start(self, front: Front, link: ClusterLink) -> None:
        """Register everything and serve."""
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(front), self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(front, link, self._access.keys), self._server)
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

    async def leave_port(self, deadline_s: float) -> None:
        """Close the port, and tell clients to come back over a new connection; calls that run may finish within
        `deadline_s`. Returns when they have."""
        await self._server.stop(deadline_s)

    async def stop(self) -> None:
        """Close the port and end all calls."""
        await self._server.stop(_CLOSE_GRACE_S)
