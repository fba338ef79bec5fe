"""gRPC to one worker: the multiplexed stream of one (gateway, worker) pair, and the snapshot of its prefix cache."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import Message

from core.errors import ProtocolError, WorkerLost
from core.ids import Epoch, GatewayId
from core.membership import LoadReport, Role, WorkerRecord
from core.rpc import Line, from_rpc_error
from core.streams import Outbox
from core.tls import ClientTls
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from protos.codec import chain_from_wire, request_to_wire
from router.config import WorkerStreamConfig
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from router.messages import WorkEvents
from router.mirror import CacheSnapshot
from router.worker_codec import read_decode_report, read_prefill_report

OnReport = Callable[[WorkEvents | LoadReport], None]
Command = TypeVar("Command", bound=Message)
Report = TypeVar("Report", bound=Message)


class _Channel(ABC, Generic[Command, Report]):
    """Connection to one incarnation of one worker. `serve` may be called again after it ended.

    Commands are dropped while the stream is down: its end has freed whatever the worker held.

    Concurrency: one event loop; at most one `serve` at a time.
    """

    def __init__(
        self, record: WorkerRecord, gateway_id: GatewayId, config: WorkerStreamConfig, tls: ClientTls | None = None
    ) -> None:
        self._record = record
        self._gateway_id = gateway_id
        self._config = config
        self._line = Line(record.address, tls)
        self._outbox: Outbox[Command] | None = None

    async def serve(self, on_welcome: Callable[[], None], on_report: OnReport) -> None:
        """Open the stream and pass on what comes. Never returns: it raises, or is cancelled.

        Raises:
            WorkerLost: no connection, no welcome in time, another incarnation answers, or the stream ended.
            ProtocolError: the worker broke the contract; the stream was cut.
        """
        worker_id = self._record.worker_id
        await self._line.renew()
        outbox = self._outbox = Outbox(self._config.max_unread_commands)
        outbox.put(self._command(hello=pb.Hello(gateway_id=self._gateway_id, worker_epoch=self._record.epoch)))
        call = self._connect(aiter(outbox))
        try:
            reports = aiter(call)
            async with asyncio.timeout(self._config.connect_timeout_s):
                self._check_welcome(await anext(reports, None))
            on_welcome()
            async for report in reports:
                on_report(self._read(report))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, worker_id) from error
        except TimeoutError as error:
            raise WorkerLost(f"{worker_id} did not answer within {self._config.connect_timeout_s:g} s") from error
        finally:
            self._outbox = None
            outbox.close()
            call.cancel()
        raise WorkerLost(f"{worker_id} ended the stream")

    def abort(self, work_id: str, reason: str) -> None:
        """Tell the worker to free what it holds."""
        self._send(self._command(abort=pb.WorkAbort(request_id=work_id, reason=reason)))

    async def list_cached_blocks(self) -> CacheSnapshot:
        """Ask for everything that the prefix cache holds.

        Raises:
            ServingError: no answer, or no proper one.
        """
        try:
            reply = await self._list_cached(self._config.connect_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._record.worker_id) from error
        chains = tuple(chain_from_wire(chain) for chain in reply.chains)
        return CacheSnapshot(Epoch(reply.epoch), reply.sequence, chains)

    async def close(self) -> None:
        await self._line.close()

    def _send(self, command: Command) -> None:
        if self._outbox is not None:
            self._outbox.put(command)

    def _check_welcome(self, report: Report | None) -> None:
        ours = self._record
        theirs = self._welcome(report) if report is not None else None
        if theirs is None:
            raise ProtocolError(f"{ours.worker_id} did not begin with a welcome")
        if (theirs.worker_id, theirs.epoch) != (ours.worker_id, ours.epoch):
            raise WorkerLost(
                f"{ours.address} is {theirs.worker_id} of epoch {theirs.epoch}, not {ours.worker_id} of {ours.epoch}"
            )

    @abstractmethod
    def _connect(self, commands: AsyncIterator[Command]) -> "grpc.aio.StreamStreamCall[Command, Report]": ...

    @abstractmethod
    async def _list_cached(self, timeout_s: float) -> pb.ListCachedBlocksResponse: ...

    @abstractmethod
    def _welcome(self, report: Report) -> pb.Welcome | None: ...

    @abstractmethod
    def _command(self, *, hello: pb.Hello | None = None, abort: pb.WorkAbort | None = None) -> Command: ...

    @abstractmethod
    def _read(self, report: Report) -> WorkEvents | LoadReport: ...


class PrefillChannel(_Channel[pb.PrefillCommand, pb.PrefillReport]):
    """To a prefill worker."""

    def submit(self, order: PrefillOrder) -> None:
        """Send the prompt."""
        message = pb.PrefillSubmit(
            request=_work_to_wire(order),
            kv_quality_floor=order.request.kv_quality_floor,
            handoff_budget_s=order.request.handoff_budget_s,
            cached_tokens=order.cached_tokens,
            bind_later=order.bind_later,
            max_queued_tokens=order.max_queued_tokens,
        )
        if order.bind_later:
            message.transfer_id = order.work_id
        elif (decode := order.decode) is not None:
            message.transfer_id = order.work_id
            message.decode_worker_id = decode.worker_id
            message.decode_epoch = decode.epoch
            message.decode_address = decode.address
        self._send(pb.PrefillCommand(submit=message))

    def bind(self, work_id: str, decode: WorkerRecord | None) -> None:
        """Tell where the KV of a prompt goes that was sent with `bind_later`; None: nowhere, generate the rest."""
        bind = pb.PrefillBind(request_id=work_id)
        if decode is not None:
            bind.decode_worker_id, bind.decode_epoch, bind.decode_address = (
                decode.worker_id,
                decode.epoch,
                decode.address,
            )
        self._send(pb.PrefillCommand(bind=bind))

    async def list_kv_decisions(self, last: int) -> pb.ListKvDecisionsResponse:
        """Ask for the last decisions on compression profiles.

        Raises:
            ServingError: no answer, or no proper one.
        """
        stub = pb_grpc.PrefillWorkerStub(self._line.channel)
        request = pb.ListKvDecisionsRequest(last=last)
        try:
            return await stub.ListKvDecisions(request, timeout=self._config.connect_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._record.worker_id) from error

    def _connect(
        self, commands: AsyncIterator[pb.PrefillCommand]
    ) -> "grpc.aio.StreamStreamCall[pb.PrefillCommand, pb.PrefillReport]":
        return pb_grpc.PrefillWorkerStub(self._line.channel).Connect(commands)

    async def _list_cached(self, timeout_s: float) -> pb.ListCachedBlocksResponse:
        stub = pb_grpc.PrefillWorkerStub(self._line.channel)
        return await stub.ListCachedBlocks(pb.ListCachedBlocksRequest(), timeout=timeout_s)

    def _welcome(self, report: pb.PrefillReport) -> pb.Welcome | None:
        return report.welcome if report.HasField("welcome") else None

    def _command(self, *, hello: pb.Hello | None = None, abort: pb.WorkAbort | None = None) -> pb.PrefillCommand:
        return pb.PrefillCommand(hello=hello, abort=abort)

    def _read(self, report: pb.PrefillReport) -> WorkEvents | LoadReport:
        return read_prefill_report(report)


class DecodeChannel(_Channel[pb.DecodeCommand, pb.DecodeReport]):
    """To a decode worker."""

    def submit(self, order: DecodeOrder) -> None:
        """Ask to reserve blocks for the KV that will be offered under the work's id, or to generate it all."""
        message = pb.DecodeSubmit(
            request=_work_to_wire(order),
            transfer_id="" if order.generate else order.work_id,
            lease_s=self._config.reservation_lease_s,
            generate=order.generate,
            max_queued_tokens=order.max_queued_tokens,
            max_requests_held=order.max_requests_held,
        )
        self._send(pb.DecodeCommand(submit=message))

    def _connect(
        self, commands: AsyncIterator[pb.DecodeCommand]
    ) -> "grpc.aio.StreamStreamCall[pb.DecodeCommand, pb.DecodeReport]":
        return pb_grpc.DecodeWorkerStub(self._line.channel).Connect(commands)

    async def _list_cached(self, timeout_s: float) -> pb.ListCachedBlocksResponse:
        stub = pb_grpc.DecodeWorkerStub(self._line.channel)
        return await stub.ListCachedBlocks(pb.ListCachedBlocksRequest(), timeout=timeout_s)

    def _welcome(self, report: pb.DecodeReport) -> pb.Welcome | None:
        return report.welcome if report.HasField("welcome") else None

    def _command(self, *, hello: pb.Hello | None = None, abort: pb.WorkAbort | None = None) -> pb.DecodeCommand:
        return pb.DecodeCommand(hello=hello, abort=abort)

    def _read(self, report: pb.DecodeReport) -> WorkEvents | LoadReport:
        return read_decode_report(report)


WorkerChannel = PrefillChannel | DecodeChannel


def _work_to_wire(order: PrefillOrder | DecodeOrder) -> pb.WorkRequest:
    wire = request_to_wire(order.request)
    wire.request_id = order.work_id
    wire.block_hashes.extend(order.block_hashes)
    return wire


def open_channel(
    record: WorkerRecord, gateway_id: GatewayId, config: WorkerStreamConfig, tls: ClientTls | None
) -> WorkerChannel:
    """Return a lazy connection to the incarnation that `record` tells of. The caller closes it."""
    kind = PrefillChannel if record.role is Role.PREFILL else DecodeChannel
    return kind(record, gateway_id, config, tls)
