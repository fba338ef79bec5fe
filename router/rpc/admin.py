"""tandem.v1.Admin: the cluster as one gateway sees it, why it did what it did, and who may call."""

from core.ids import RequestId, WorkerId
from core.rpc import reply_errors
from protos import admin_pb2, admin_pb2_grpc
from router.access.sources import SHARED, KeySources
from router.cluster_link import ClusterLink
from router.explain.replies import decision_to_wire
from router.front import Front
from router.rpc.key_messages import key_to_wire, roles_from_wire
from router.rpc.status import cluster_status

_EXPLAINED = 20  # decisions, when the call does not say how many


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """tandem.v1.Admin."""

    def __init__(self, front: Front, link: ClusterLink, keys: KeySources) -> None:
        self._front = front
        self._link = link
        self._keys = keys

    async def GetClusterStatus(  # noqa: N802
        self, request: admin_pb2.GetClusterStatusRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.GetClusterStatusResponse:
        return cluster_status(self._front)

    async def ListKvDecisions(  # noqa: N802
        self, request: admin_pb2.AdminListKvDecisionsRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.AdminListKvDecisionsResponse:
        async with reply_errors(context):
            link, last = self._link, request.last
            if request.worker_id:
                found = [await link.list_kv_decisions(WorkerId(request.worker_id), last)]
            else:
                found = await link.list_all_kv_decisions(last)
            return admin_pb2.AdminListKvDecisionsResponse(workers=found)

    async def ExplainRequest(  # noqa: N802
        self, request: admin_pb2.ExplainRequestRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.ExplainRequestResponse:
        front = self._front
        now = front.clock.now()
        explained = front.explain(RequestId(request.request_id), request.last or _EXPLAINED)
        decisions = [decision_to_wire(one, now) for one in explained]
        return admin_pb2.ExplainRequestResponse(gateway_id=front.gateway_id, decisions=decisions)

    async def CreateApiKey(  # noqa: N802
        self, request: admin_pb2.CreateApiKeyRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.CreateApiKeyResponse:
        async with reply_errors(context):
            lifetime_s = request.lifetime_s if request.HasField("lifetime_s") else None
            roles = roles_from_wire(request.roles)
            key, secret = await self._keys.create(request.name, request.tenant, roles, lifetime_s)
            return admin_pb2.CreateApiKeyResponse(api_key=key_to_wire(key, SHARED), secret=secret)

    async def ListApiKeys(  # noqa: N802
        self, request: admin_pb2.ListApiKeysRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.ListApiKeysResponse:
        async with reply_errors(context):
            found = [key_to_wire(key, source) for source, key in await self._keys.list_all()]
            return admin_pb2.ListApiKeysResponse(api_keys=found)

    async def RevokeApiKey(  # noqa: N802
        self, request: admin_pb2.RevokeApiKeyRequest, context: "admin_pb2_grpc._ServicerContext"
    ) -> admin_pb2.RevokeApiKeyResponse:
        async with reply_errors(context):
            source, key = await self._keys.revoke(request.fingerprint)
            return admin_pb2.RevokeApiKeyResponse(api_key=key_to_wire(key, source))
