"""tandem.v1.Admin: the cluster as one gateway sees it, and why it did what it did."""

from core.ids import RequestId, WorkerId
from core.rpc import reply_errors
from protos import admin_pb2, admin_pb2_grpc
from router.cluster_link import ClusterLink
from router.explain.replies import decision_to_wire
from router.front import Front
from router.rpc.status import cluster_status

_EXPLAINED = 20  # decisions, when the call does not say how many


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
