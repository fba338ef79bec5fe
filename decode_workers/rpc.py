"""gRPC to core types and back, for the decode worker. The only importer of grpc in this package."""

from collections.abc import AsyncIterator

from core.ids import TransferId
from core.streams import Outbox
from decode_workers.desk import DecodeDesk
from decode_workers.messages import Expected, Report, SendLanded
from decode_workers.policy import Terms
from kv_transfer.rpc import add_kv_transfer
from protos import codec, worker_pb2, worker_pb2_grpc
from workers.rpc import Context, GatewayCalls, WorkerServer, shared_report_to_wire


def add_decode_worker(desk: DecodeDesk, calls: GatewayCalls, server: WorkerServer) -> None:
    """Serve gateways, and the prefill workers that send KV."""
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(_Servicer(desk, calls), server.grpc)
    add_kv_transfer(desk.transfers, server.grpc)


class _Servicer(worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, desk: DecodeDesk, calls: GatewayCalls) -> None:
        self._desk = desk
        self._calls = calls

    # gRPC allows a coroutine here, and its stubs do not know it.
    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.DecodeCommand], context: Context
    ) -> None:
        def on_submit(stream: Outbox[Report], submit: worker_pb2.DecodeSubmit) -> None:
            expected = None if submit.generate else Expected(TransferId(submit.transfer_id), submit.lease_s)
            self._desk.submit(stream, codec.request_from_wire(submit.request), expected, terms_from_wire(submit))

        await self._calls.connect(
            request_iterator, context, worker_pb2.DecodeReport, handlers={"submit": on_submit}, encode=report_to_wire
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: worker_pb2.ListCachedBlocksRequest, context: Context
    ) -> worker_pb2.ListCachedBlocksResponse:
        return await self._calls.list_cached_blocks(context)


def terms_from_wire(submit: worker_pb2.DecodeSubmit) -> Terms:
    """Pure."""
    return Terms(
        submit.max_queued_tokens if submit.HasField("max_queued_tokens") else None,
        submit.max_requests_held if submit.HasField("max_requests_held") else None,
    )


def report_to_wire(report: Report) -> worker_pb2.DecodeReport:
    """Pure."""
    match report:
        case SendLanded():
            landed = worker_pb2.KvLanded(
                request_id=report.request_id,
                exposed_s=report.exposed_s,
                first_decode_s=report.first_decode_s,
                kv_tokens_held=report.kv_tokens_held,
                kv_tokens_sent=report.kv_tokens_sent,
                kv_bytes=report.kv_bytes,
                kv_wire_bytes=report.kv_wire_bytes,
                kv_profile=report.kv_profile,
                kv_lossless=report.is_lossless,
            )
            return worker_pb2.DecodeReport(landed=landed)
        case _:
            return worker_pb2.DecodeReport(**shared_report_to_wire(report))
