"""gRPC to core types and back, for the prefill worker. The only importer of grpc in this package."""

from collections.abc import AsyncIterator

from core.ids import Epoch, TransferId, WorkerId
from core.streams import Outbox
from prefill_workers.desk import PrefillDesk
from prefill_workers.messages import HandOff, Report, SendComputed, SendHandedOver
from protos import codec, worker_pb2, worker_pb2_grpc
from workers.rpc import Context, GatewayCalls, WorkerServer, shared_report_to_wire


def add_prefill_worker(desk: PrefillDesk, calls: GatewayCalls, server: WorkerServer) -> None:
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(_Servicer(desk, calls), server.grpc)


class _Servicer(worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, desk: PrefillDesk, calls: GatewayCalls) -> None:
        self._desk = desk
        self._calls = calls

    # gRPC allows a coroutine here, and its stubs do not know it.
    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.PrefillCommand], context: Context
    ) -> None:
        def on_submit(stream: Outbox[Report], submit: worker_pb2.PrefillSubmit) -> None:
            self._desk.submit(stream, codec.request_from_wire(submit.request), hand_off_from_wire(submit))

        await self._calls.connect(
            request_iterator, context, worker_pb2.PrefillReport, on_submit=on_submit, encode=report_to_wire
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: worker_pb2.ListCachedBlocksRequest, context: Context
    ) -> worker_pb2.ListCachedBlocksResponse:
        return await self._calls.list_cached_blocks(context)


def hand_off_from_wire(submit: worker_pb2.PrefillSubmit) -> HandOff | None:
    """Return where the KV goes; None for no hand-off. Pure."""
    if not submit.transfer_id:
        return None
    return HandOff(
        TransferId(submit.transfer_id),
        WorkerId(submit.decode_worker_id),
        Epoch(submit.decode_epoch),
        submit.decode_address,
    )


def report_to_wire(report: Report) -> worker_pb2.PrefillReport:
    """Pure."""
    match report:
        case SendComputed(request_id, queue_s, compute_s, cached_tokens):
            computed = worker_pb2.PrefillComputed(
                request_id=request_id, queue_s=queue_s, compute_s=compute_s, cached_tokens=cached_tokens
            )
            return worker_pb2.PrefillReport(computed=computed)
        case SendHandedOver(request_id):
            return worker_pb2.PrefillReport(handed_over=worker_pb2.HandedOver(request_id=request_id))
        case _:
            return worker_pb2.PrefillReport(**shared_report_to_wire(report))
