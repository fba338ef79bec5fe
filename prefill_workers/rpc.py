"""gRPC to core types and back, for the prefill worker. The only importer of grpc in this package."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from core.errors import ProtocolError
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.streams import Outbox
from prefill_workers.desk import PrefillDesk
from prefill_workers.messages import Destination, HandOff, LinkFacts, Report, SendHandedOver
from protos import codec, worker_pb2, worker_pb2_grpc
from workers.rpc import Context, GatewayCalls, Handler, WorkerServer, shared_report_to_wire

M = TypeVar("M", bound=Message)
_LAST_DECISIONS = 100


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
            max_queued_tokens = submit.max_queued_tokens if submit.HasField("max_queued_tokens") else None
            request, hand_off = codec.request_from_wire(submit.request), hand_off_from_wire(submit)
            self._desk.submit(stream, request, hand_off, max_queued_tokens=max_queued_tokens)

        def on_bind(stream: Outbox[Report], bind: worker_pb2.PrefillBind) -> None:
            self._desk.bind(stream, RequestId(bind.request_id), _destination(bind) if bind.decode_worker_id else None)

        handlers: Mapping[str, Handler] = {"submit": on_submit, "bind": on_bind}

        await self._calls.connect(
            request_iterator, context, worker_pb2.PrefillReport, handlers=handlers, encode=report_to_wire
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: worker_pb2.ListCachedBlocksRequest, context: Context
    ) -> worker_pb2.ListCachedBlocksResponse:
        return await self._calls.list_cached_blocks(context)

    async def ListKvDecisions(  # noqa: N802
        self, request: worker_pb2.ListKvDecisionsRequest, context: Context
    ) -> worker_pb2.ListKvDecisionsResponse:
        identity = self._desk.identity
        decisions = self._desk.kv_decisions(request.last or _LAST_DECISIONS)
        return worker_pb2.ListKvDecisionsResponse(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            decisions=[decision_to_wire(decision) for decision in decisions],
        )


def hand_off_from_wire(submit: worker_pb2.PrefillSubmit) -> HandOff | None:
    """Return where the KV goes; None for no hand-off. Pure.

    Raises:
        ProtocolError: a floor or a budget that no gateway lets through, or a late binding of nothing.
    """
    if not submit.transfer_id:
        if submit.bind_later:
            raise ProtocolError("a transfer that is to be bound later, without its id")
        return None
    floor = submit.kv_quality_floor if submit.HasField("kv_quality_floor") else None
    budget_s = submit.handoff_budget_s if submit.HasField("handoff_budget_s") else None
    if not (floor is None or 0.0 <= floor <= 1.0) or not (budget_s is None or budget_s >= 0.0):
        raise ProtocolError(f"a transfer with floor {floor} and budget {budget_s}")
    return HandOff(
        TransferId(submit.transfer_id),
        None if submit.bind_later else _destination(submit),
        floor,
        budget_s,
        submit.cached_tokens,
    )


def _destination(message: worker_pb2.PrefillSubmit | worker_pb2.PrefillBind) -> Destination:
    return Destination(WorkerId(message.decode_worker_id), Epoch(message.decode_epoch), message.decode_address)


def decision_to_wire(decision: Mapping[str, Any]) -> worker_pb2.KvDecision:
    """Return what the controller keeps of one transfer (`kv_transfer.controller.decisions`). Pure."""
    outcome = decision["outcome"]
    message = _typed(worker_pb2.KvDecision, decision)
    message.candidates.extend(_typed(worker_pb2.KvCandidate, candidate) for candidate in decision["candidates"])
    if outcome is not None:
        message.outcome.CopyFrom(_typed(worker_pb2.KvOutcome, outcome))
    message.json = json.dumps(decision)
    return message


def _typed(kind: type[M], values: Mapping[str, Any]) -> M:
    """Return a message with those of the values that it has scalar fields for; what is None stays absent."""
    scalars = [field.name for field in kind.DESCRIPTOR.fields if field.message_type is None]
    return kind(**{name: values[name] for name in scalars if values.get(name) is not None})


def report_to_wire(report: Report) -> worker_pb2.PrefillReport:
    """Pure."""
    match report:
        case SendHandedOver(request_id, link):
            return worker_pb2.PrefillReport(handed_over=_handed_over_to_wire(request_id, link))
        case _:
            return worker_pb2.PrefillReport(**shared_report_to_wire(report))


def _handed_over_to_wire(request_id: RequestId, link: LinkFacts | None) -> worker_pb2.HandedOver:
    if link is None:
        return worker_pb2.HandedOver(request_id=request_id)
    return worker_pb2.HandedOver(
        request_id=request_id,
        link_goodput_bytes_per_s=link.goodput_bytes_per_s,
        link_rtt_s=link.rtt_s,
        link_queued_bytes=link.queued_bytes,
    )
