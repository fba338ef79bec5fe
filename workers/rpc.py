"""gRPC that both kinds of worker share: the server, the stream of a gateway, the snapshot of the prefix cache.

The roles' own `rpc` modules add the service that they are, how a submission reads, and their own reports.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import grpc

from core import rpc
from core.errors import ProtocolError
from core.ids import RequestId
from core.kv_events import BlocksStored
from core.membership import LoadReport, WorkerIdentity
from core.streams import Outbox, serve_stream
from core.tls import PeerTls
from protos import codec, worker_pb2
from workers import messages as m

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Outbox[Any], Any], None]  # of one kind of command


class Gateways(Protocol):
    """What a worker does for gateways, whatever its role."""

    @property
    def identity(self) -> WorkerIdentity: ...

    def connect(self) -> Outbox[Any]:
        """Open a stream; what goes to the gateway comes out of the outbox."""
        ...

    def abort(self, stream: Outbox[Any], request_id: RequestId, reason: str) -> None: ...

    def disconnect(self, stream: Outbox[Any]) -> None:
        """The stream ended: give up all that came over it."""
        ...

    async def list_cached_blocks(self) -> tuple[int, list[BlocksStored]]:
        """Return the number of the last event that the snapshot includes, and its chains."""
        ...


class WorkerServer:
    """The worker's gRPC server. Services are added to `grpc` before `start`."""

    def __init__(self, host: str, port: int, tls: PeerTls | None = None) -> None:
        """Bind.

        Args:
            tls: only processes of the cluster may call; None: everybody may.

        Raises:
            ConfigError: the address is in use or not ours, or the certificate cannot be used.
        """
        self.grpc = rpc.create_server()
        self.address = f"{host}:{rpc.bind(self.grpc, host, port, tls.server if tls is not None else None)}"

    async def start(self) -> None:
        await self.grpc.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, cancel those that are still open after `grace_s`."""
        await self.grpc.stop(grace_s)


class GatewayCalls:
    """The calls that both services have."""

    def __init__(self, worker: Gateways, hello_timeout_s: float) -> None:
        self._worker = worker
        self._hello_timeout_s = hello_timeout_s

    async def connect(
        self,
        commands: AsyncIterator[Any],
        context: Context,
        report_type: type[Any],
        *,
        handlers: Mapping[str, Handler],
        encode: Callable[[Any], Any],
    ) -> None:
        """Serve one gateway's stream: hello, welcome, then commands and reports until either side ends it.

        Args:
            handlers: what the role does with each command that it has beside hello and abort, by its name.

        A coroutine that calls `context.write`, not a generator: the `finally` of a generator would run only when the
        collector finds it after a cancelled call.
        """
        worker, identity = self._worker, self._worker.identity
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first = await anext(commands, None)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {self._hello_timeout_s:g} s")
        if first is None or first.WhichOneof("command") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be hello")
        if first.hello.worker_epoch != identity.epoch:
            detail = f"{identity.worker_id} is in epoch {identity.epoch}, not {first.hello.worker_epoch}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)
        welcome = worker_pb2.Welcome(worker_id=identity.worker_id, epoch=identity.epoch)
        await context.write(report_type(welcome=welcome))
        stream = worker.connect()

        def on_command(command: Any) -> None:
            kind = command.WhichOneof("command")
            if kind == "abort":
                worker.abort(stream, RequestId(command.abort.request_id), command.abort.reason)
            elif kind in handlers:
                handlers[kind](stream, getattr(command, kind))
            else:
                raise ProtocolError(f"unexpected command {kind!r}")

        try:
            async with rpc.reply_errors(context):
                await serve_stream(commands, context.write, stream, on_command=on_command, encode=encode)
        finally:
            worker.disconnect(stream)

    async def list_cached_blocks(self, context: Context) -> worker_pb2.ListCachedBlocksResponse:
        async with rpc.reply_errors(context):
            sequence, chains = await self._worker.list_cached_blocks()
        return worker_pb2.ListCachedBlocksResponse(
            worker_id=self._worker.identity.worker_id,
            epoch=self._worker.identity.epoch,
            sequence=sequence,
            chains=[codec.chain_to_wire(chain) for chain in chains],
        )


def shared_report_to_wire(report: m.SharedReport) -> dict[str, Any]:
    """Return the field of either service's report, and its value. Pure."""
    match report:
        case m.SendAnswer(answer, load):
            return _answer_to_wire(answer, load)
        case m.SendOutputs(outputs):
            return {"outputs": codec.outputs_to_wire(outputs)}
        case m.SendComputed(request_id, queue_s, compute_s, cached_tokens):
            computed = worker_pb2.PrefillComputed(
                request_id=request_id, queue_s=queue_s, compute_s=compute_s, cached_tokens=cached_tokens
            )
            return {"computed": computed}
        case m.SendLoad(load):
            return {"load": codec.load_to_wire(load)}
        case m.SendFailed(request_id, error):
            return {"failed": codec.failure_to_wire(request_id, error)}


def _answer_to_wire(answer: m.SendAccepted | m.SendRejected, load: LoadReport) -> dict[str, Any]:
    match answer:
        case m.SendAccepted(request_id, held_tokens):
            wire_load = codec.load_to_wire(load)
            accepted = worker_pb2.Accepted(request_id=request_id, cached_tokens=held_tokens, load=wire_load)
            return {"accepted": accepted}
        case m.SendRejected(request_id, error):
            return {"rejected": codec.rejection_to_wire(request_id, error, load)}
