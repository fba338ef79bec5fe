"""gRPC to core types and back, for the decode worker. The only importer of grpc in this package."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, cast

import grpc

from core import rpc
from core.errors import ProtocolError
from core.ids import RequestId, TransferId
from core.membership import WorkerIdentity
from core.request import GenerateRequest
from core.streams import Outbox, serve_stream
from decode_workers.messages import (
    Report,
    SendAccepted,
    SendFailed,
    SendLanded,
    SendLoad,
    SendOutputs,
    SendRejected,
)
from kv_transfer.receiver import KvReceiver
from kv_transfer.rpc import add_kv_transfer
from protos import codec, worker_pb2, worker_pb2_grpc

_PROFILE = "none"  # frames carry KV as it is
_Context = grpc.aio.ServicerContext[worker_pb2.DecodeCommand, worker_pb2.DecodeReport]


class Commands(Protocol):
    """What the service does for gateways."""

    @property
    def identity(self) -> WorkerIdentity: ...

    def connect(self) -> Outbox[Report]:
        """Open a stream; what goes to the gateway comes out of the outbox."""
        ...

    def submit(self, stream: Outbox[Report], request: GenerateRequest, transfer_id: TransferId, lease_s: float) -> None:
        """Accept or reject, by a report: at once, or after the engine was asked for blocks."""
        ...

    def abort(self, stream: Outbox[Report], request_id: RequestId, reason: str) -> None: ...

    def disconnect(self, stream: Outbox[Report]) -> None:
        """The stream ended: give up all that came over it."""
        ...

    async def list_cached_blocks(self) -> tuple[int, list[tuple[bytes, tuple[bytes, ...]]]]:
        """Return the number of the last event that the snapshot includes, and its chains (parent, hashes)."""
        ...


class DecodeServer:
    """The worker's gRPC server: for gateways, and for the prefill workers that send KV."""

    def __init__(self, worker: Commands, host: str, port: int, hello_timeout_s: float, receiver: KvReceiver) -> None:
        """Bind.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        self._server = rpc.create_server()
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(_Servicer(worker, hello_timeout_s), self._server)
        add_kv_transfer(receiver, self._server)
        self.address = f"{host}:{rpc.bind(self._server, host, port)}"

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, cancel those that are still open after `grace_s`."""
        await self._server.stop(grace_s)


class _Servicer(worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, worker: Commands, hello_timeout_s: float) -> None:
        self._worker = worker
        self._hello_timeout_s = hello_timeout_s

    # Written as a coroutine that calls `context.write`, which gRPC allows and its stubs do not know: the `finally` of a
    # generator would run only when the collector finds it after a cancelled call.
    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.DecodeCommand], context: _Context
    ) -> None:
        identity = self._worker.identity
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first = await anext(request_iterator, None)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {self._hello_timeout_s:g} s")
        if first is None or first.WhichOneof("command") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be hello")
        if first.hello.worker_epoch != identity.epoch:
            detail = f"{identity.worker_id} is in epoch {identity.epoch}, not {first.hello.worker_epoch}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)
        welcome = worker_pb2.Welcome(worker_id=identity.worker_id, epoch=identity.epoch)
        await context.write(worker_pb2.DecodeReport(welcome=welcome))
        stream = self._worker.connect()

        def on_command(command: worker_pb2.DecodeCommand) -> None:
            match command.WhichOneof("command"):
                case "submit":
                    submit = command.submit
                    request = codec.request_from_wire(submit.request)
                    self._worker.submit(stream, request, TransferId(submit.transfer_id), submit.lease_s)
                case "abort":
                    self._worker.abort(stream, RequestId(command.abort.request_id), command.abort.reason)
                case other:
                    raise ProtocolError(f"unexpected command {other!r}")

        try:
            async with rpc.reply_errors(cast("grpc.aio.ServicerContext[object, object]", context)):
                await serve_stream(
                    request_iterator, context.write, stream, on_command=on_command, encode=report_to_wire
                )
        finally:
            self._worker.disconnect(stream)

    async def ListCachedBlocks(  # noqa: N802
        self, request: worker_pb2.ListCachedBlocksRequest, context: object
    ) -> worker_pb2.ListCachedBlocksResponse:
        async with rpc.reply_errors(cast("grpc.aio.ServicerContext[object, object]", context)):
            sequence, chains = await self._worker.list_cached_blocks()
        return worker_pb2.ListCachedBlocksResponse(
            worker_id=self._worker.identity.worker_id,
            epoch=self._worker.identity.epoch,
            sequence=sequence,
            chains=[worker_pb2.CachedChain(parent=parent, hashes=hashes) for parent, hashes in chains],
        )


def report_to_wire(report: Report) -> worker_pb2.DecodeReport:
    """Pure."""
    match report:
        case SendAccepted(request_id, held_tokens):
            accepted = worker_pb2.Accepted(request_id=request_id, cached_tokens=held_tokens)
            return worker_pb2.DecodeReport(accepted=accepted)
        case SendRejected(request_id, error):
            return worker_pb2.DecodeReport(rejected=codec.rejection_to_wire(request_id, error))
        case SendOutputs(outputs):
            return worker_pb2.DecodeReport(outputs=codec.outputs_to_wire(outputs))
        case SendLoad(load):
            return worker_pb2.DecodeReport(load=codec.load_to_wire(load))
        case SendLanded():
            landed = worker_pb2.KvLanded(
                request_id=report.request_id,
                exposed_s=report.exposed_s,
                first_decode_s=report.first_decode_s,
                kv_tokens_held=report.kv_tokens_held,
                kv_tokens_sent=report.kv_tokens_sent,
                kv_bytes=report.kv_bytes,
                kv_profile=_PROFILE,
            )
            return worker_pb2.DecodeReport(landed=landed)
        case SendFailed(request_id, error):
            return worker_pb2.DecodeReport(failed=codec.failure_to_wire(request_id, error))
