"""Prefill and decode workers that speak the real gRPC protocol and compute nothing.

A `FakeNetwork` joins them: it says what the model "generates" and carries a prefill worker's hand-over to the decode
worker that reserved for it. Tests steer by events: a worker can be told to refuse, to keep silent, to hold back tokens,
to die.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Generic, TypeVar, cast

import grpc

from core.errors import StoreUnavailable
from core.ids import Epoch, RequestId, WorkerId
from core.kv_events import BlocksStored, KvEvent, KvEventBatch
from core.membership import LoadReport, Role, WorkerRecord, WorkerState, kv_event_stream, worker_key
from core.request import RequestOutput, TokenLogprob, TokenOutput
from core.rpc import bind, create_server
from core.store import Store
from core.streams import Outbox
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from protos.codec import kv_events_to_wire, outputs_to_wire, rejection_to_wire
from tests.fakes.script import PATIENCE_S, FakeNetwork, Reply, WorkerScript, client_id

WEIGHTS_VERSION = "fake-weights"
BLOCK_SIZE = 4
LAYOUT = "layout-a"

Report = TypeVar("Report", pb.PrefillReport, pb.DecodeReport)


class _FakeWorker(Generic[Report]):
    """What both roles share: server, record, streams, bookkeeping."""

    role: Role

    def __init__(
        self,
        name: str,
        network: FakeNetwork,
        store: Store,
        cluster: str,
        *,
        epoch: int = 1,
        layout: str = LAYOUT,
        max_model_len: int = 512,
    ) -> None:
        self.worker_id = WorkerId(name)
        self.epoch = Epoch(epoch)
        self.script = WorkerScript()
        self.network = network
        self.submits: list[pb.PrefillSubmit | pb.DecodeSubmit] = []
        self.aborts: list[tuple[str, str]] = []
        self.gateways: list[str] = []
        self.held: set[str] = set()  # request ids that occupy this worker
        self._store = store
        self._cluster = cluster
        self._layout = layout
        self.max_model_len = max_model_len
        self._server: grpc.aio.Server | None = None
        self._address = ""
        self._works: dict[str, asyncio.Task[None]] = {}
        self._sequence = 0
        self._chains: list[BlocksStored] = []
        self._changed = asyncio.Condition()

    @property
    def address(self) -> str:
        return self._address

    def record(self, state: WorkerState = WorkerState.READY, load: LoadReport | None = None) -> WorkerRecord:
        return WorkerRecord(
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch,
            state=state,
            address=self._address,
            metrics_port=9100,
            model="fake",
            layout_fingerprint=self._layout,
            weights_version=WEIGHTS_VERSION,
            dtype="float32",
            kv_bytes_per_token=self.network.bytes_per_token,
            block_size=BLOCK_SIZE,
            max_model_len=self.max_model_len,
            load=load or LoadReport(),
        )

    async def start(self, port: int = 0) -> None:
        """Listen and register as READY."""
        self._server = create_server()
        self._add_to(self._server)
        self._address = f"127.0.0.1:{bind(self._server, '127.0.0.1', port)}"
        await self._server.start()
        await self.register()

    async def register(self, state: WorkerState = WorkerState.READY, load: LoadReport | None = None) -> None:
        key = worker_key(self._cluster, self.worker_id)
        await self._store.put(key, self.record(state, load).model_dump_json().encode())

    async def deregister(self) -> None:
        await self._store.delete(worker_key(self._cluster, self.worker_id))

    async def kill(self) -> None:
        """Die as by SIGKILL: every stream breaks, the record stays. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        for task in list(self._works.values()):
            task.cancel()
        await asyncio.gather(*self._works.values(), return_exceptions=True)

    async def publish(self, *events: KvEvent) -> None:
        """Append KV events to the store."""
        for event in events:
            if isinstance(event, BlocksStored):
                self._chains.append(event)
        self._sequence += 1
        batch = KvEventBatch(self.worker_id, self.epoch, self._sequence, events)
        stream = kv_event_stream(self._cluster, self.worker_id)
        with contextlib.suppress(StoreUnavailable):  # lost on the way: the next one shows the gap
            await self._store.append(stream, kv_events_to_wire(batch).SerializeToString(), max_entries=100)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that a command changes."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(condition)

    async def wait_submitted(self, count: int = 1) -> None:
        await self.wait_until(lambda: len(self.submits) >= count)

    async def wait_aborted(self, request_id: str) -> None:
        await self.wait_until(lambda: any(client_id(name) == request_id for name, _ in self.aborts))

    async def list_cached(self) -> pb.ListCachedBlocksResponse:
        chains = [pb.CachedChain(parent=chain.parent, hashes=chain.hashes) for chain in self._chains]
        return pb.ListCachedBlocksResponse(
            worker_id=self.worker_id, epoch=self.epoch, sequence=self._sequence, chains=chains
        )

    async def note(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def serve(
        self,
        hello: pb.Hello | None,
        context: "grpc.aio.ServicerContext[object, Report]",
        commands: AsyncIterator[pb.PrefillCommand] | AsyncIterator[pb.DecodeCommand],
    ) -> None:
        """Run one stream to its end, then free what came over it."""
        if hello is None or hello.worker_epoch != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "stale epoch")
        assert hello is not None
        self.gateways.append(hello.gateway_id)
        outbox: Outbox[Report] = Outbox(10_000)
        outbox.put(self._welcome(pb.Welcome(worker_id=self.worker_id, epoch=self.epoch)))
        works: list[str] = []
        reader = asyncio.create_task(self._read(commands, outbox, works))
        reader.add_done_callback(lambda _: outbox.close())
        try:
            async for report in outbox:
                await context.write(report)
        finally:
            reader.cancel()
            for request_id in works:
                self._free(request_id)
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(
        self,
        commands: AsyncIterator[pb.PrefillCommand] | AsyncIterator[pb.DecodeCommand],
        outbox: Outbox[Report],
        works: list[str],
    ) -> None:
        async for command in commands:
            match command.WhichOneof("command"):
                case "abort":
                    self.aborts.append((command.abort.request_id, command.abort.reason))
                    self._free(command.abort.request_id)
                case "submit":
                    self.submits.append(command.submit)
                    self._take(command.submit, outbox, works)
            await self.note()

    def _take(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[Report], works: list[str]) -> None:
        if self.script.is_silent:
            return
        request_id = submit.request.request_id
        refused = self.script.next_refusal()
        if refused is not None:
            outbox.put(self._rejected(rejection_to_wire(RequestId(request_id), refused)))
            return
        self.held.add(request_id)
        works.append(request_id)
        cached = self._cached_tokens(submit.request)
        outbox.put(self._accepted(pb.Accepted(request_id=request_id, cached_tokens=cached)))
        task = asyncio.create_task(self._work(submit, outbox))
        self._works[request_id] = task
        task.add_done_callback(lambda _: self._works.pop(request_id, None))

    def _cached_tokens(self, request: pb.WorkRequest) -> int:
        known = {block for chain in self._chains for block in chain.hashes}
        held = 0
        for block in request.block_hashes:
            if block not in known:
                break
            held += BLOCK_SIZE
        return held

    def _free(self, request_id: str) -> None:
        self.held.discard(request_id)
        task = self._works.get(request_id)
        if task is not None:
            task.cancel()

    def _tokens(self, request: pb.WorkRequest, reply: Reply, start: int, end: int) -> tuple[TokenOutput, ...]:
        wants = request.sampling.HasField("logprobs")
        num_tops = request.sampling.logprobs + self.network.padding_logprobs
        tops = tuple(TokenLogprob(index % 100, -1.0 - index) for index in range(num_tops))
        tokens = tuple(
            TokenOutput(index, reply.token_ids[index], -0.5 if wants else None, tops if wants else ())
            for index in range(start, end)
        )
        return self.script.garble(tokens) if self.script.garble else tokens

    def _add_to(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def _work(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[Report]) -> None:
        raise NotImplementedError

    def _welcome(self, welcome: pb.Welcome) -> Report:
        raise NotImplementedError

    def _accepted(self, accepted: pb.Accepted) -> Report:
        raise NotImplementedError

    def _rejected(self, rejected: pb.Rejected) -> Report:
        raise NotImplementedError


class FakePrefillWorker(_FakeWorker[pb.PrefillReport]):
    """Accepts, "computes", streams the first token, hands over."""

    role = Role.PREFILL
    hands_over = True
    """False: the KV never leaves."""
    kv_decisions: Sequence[pb.KvDecision] = ()
    """What it answers when it is asked for them."""

    def _add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_PrefillWorkerServicer_to_server(_PrefillServicer(self), server)

    async def _work(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[pb.PrefillReport]) -> None:
        assert isinstance(submit, pb.PrefillSubmit)
        request, request_id = submit.request, RequestId(submit.request.request_id)
        await self.script.go.wait()
        if self.script.failure is not None:
            failure = pb.WorkFailed()
            failure.CopyFrom(self.script.failure)
            failure.request_id = request_id
            self.held.discard(request_id)
            outbox.put(pb.PrefillReport(failed=failure))
            return
        reply = self.network.reply(request)
        is_last = len(reply.token_ids) == 1
        output = RequestOutput(request_id, self._tokens(request, reply, 0, 1), reply.finish if is_last else None)
        outbox.put(pb.PrefillReport(outputs=outputs_to_wire([output])))
        cached = self._cached_tokens(request)
        outbox.put(
            pb.PrefillReport(
                computed=pb.PrefillComputed(request_id=request_id, queue_s=0.001, compute_s=0.002, cached_tokens=cached)
            )
        )
        if request.block_hashes and cached < len(request.block_hashes) * BLOCK_SIZE:
            await self.publish(BlocksStored(b"\0" * 16, tuple(request.block_hashes)))
        self.held.discard(request_id)
        if not is_last and self.hands_over:
            self.network.landing(submit.transfer_id).set()
            outbox.put(pb.PrefillReport(handed_over=pb.HandedOver(request_id=request_id)))
        await self.note()

    def _welcome(self, welcome: pb.Welcome) -> pb.PrefillReport:
        return pb.PrefillReport(welcome=welcome)

    def _accepted(self, accepted: pb.Accepted) -> pb.PrefillReport:
        return pb.PrefillReport(accepted=accepted)

    def _rejected(self, rejected: pb.Rejected) -> pb.PrefillReport:
        return pb.PrefillReport(rejected=rejected)


class FakeDecodeWorker(_FakeWorker[pb.DecodeReport]):
    """Reserves, waits for the KV, streams the rest of the tokens one step at a time."""

    role = Role.DECODE

    def __init__(
        self,
        name: str,
        network: FakeNetwork,
        store: Store,
        cluster: str,
        *,
        epoch: int = 1,
        layout: str = LAYOUT,
        max_model_len: int = 512,
    ) -> None:
        super().__init__(name, network, store, cluster, epoch=epoch, layout=layout, max_model_len=max_model_len)
        self.steps_allowed = asyncio.Semaphore(1_000_000)
        """Every token after the first takes one; a test that wants to stop in mid-stream replaces it."""
        self._spent: set[str] = set()  # a real receiver remembers transfers that ended, too

    def _add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_DecodeWorkerServicer_to_server(_DecodeServicer(self), server)

    async def _work(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[pb.DecodeReport]) -> None:
        assert isinstance(submit, pb.DecodeSubmit)
        request, request_id = submit.request, RequestId(submit.request.request_id)
        held = self._cached_tokens(request)
        if submit.transfer_id in self._spent:
            self.held.discard(request_id)
            reused = pb.WorkFailed(request_id=request_id, grpc_code="UNAVAILABLE", reason="not_expected")
            outbox.put(pb.DecodeReport(failed=reused))
            return
        self._spent.add(submit.transfer_id)
        await self.network.landing(submit.transfer_id).wait()
        await self.script.go.wait()
        if self.script.failure is not None:
            failure = pb.WorkFailed()
            failure.CopyFrom(self.script.failure)
            failure.request_id = request_id
            self.held.discard(request_id)
            outbox.put(pb.DecodeReport(failed=failure))
            return
        sent = len(request.prompt_token_ids) - held
        landed = pb.KvLanded(
            request_id=request_id,
            exposed_s=0.003,
            first_decode_s=0.004,
            kv_tokens_held=held,
            kv_tokens_sent=sent,
            kv_bytes=sent * self.network.bytes_per_token,
            kv_profile="none",
            kv_lossless=True,
            kv_wire_bytes=sent * self.network.bytes_per_token + 64,
        )
        outbox.put(pb.DecodeReport(landed=landed))
        reply = self.network.reply(request)
        for index in range(1, len(reply.token_ids)):
            await self.steps_allowed.acquire()
            is_last = index == len(reply.token_ids) - 1
            tokens = self._tokens(request, reply, index, index + 1)
            output = RequestOutput(request_id, tokens, reply.finish if is_last else None)
            if is_last:
                self.held.discard(request_id)
            outbox.put(pb.DecodeReport(outputs=outputs_to_wire([output])))
        await self.note()

    def _welcome(self, welcome: pb.Welcome) -> pb.DecodeReport:
        return pb.DecodeReport(welcome=welcome)

    def _accepted(self, accepted: pb.Accepted) -> pb.DecodeReport:
        return pb.DecodeReport(accepted=accepted)

    def _rejected(self, rejected: pb.Rejected) -> pb.DecodeReport:
        return pb.DecodeReport(rejected=rejected)


class _PrefillServicer(pb_grpc.PrefillWorkerServicer):
    def __init__(self, worker: FakePrefillWorker) -> None:
        self._worker = worker

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PrefillCommand], context: "pb_grpc._ServicerContext"
    ) -> None:
        first = await anext(request_iterator, None)
        hello = first.hello if first is not None and first.HasField("hello") else None
        await self._worker.serve(
            hello, cast("grpc.aio.ServicerContext[object, pb.PrefillReport]", context), request_iterator
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: pb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListCachedBlocksResponse:
        return await self._worker.list_cached()

    async def ListKvDecisions(  # noqa: N802
        self, request: pb.ListKvDecisionsRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListKvDecisionsResponse:
        worker = self._worker
        decisions = worker.kv_decisions[: request.last or None]
        return pb.ListKvDecisionsResponse(worker_id=worker.worker_id, epoch=worker.epoch, decisions=decisions)


class _DecodeServicer(pb_grpc.DecodeWorkerServicer):
    def __init__(self, worker: FakeDecodeWorker) -> None:
        self._worker = worker

    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.DecodeCommand], context: "pb_grpc._ServicerContext"
    ) -> None:
        first = await anext(request_iterator, None)
        hello = first.hello if first is not None and first.HasField("hello") else None
        await self._worker.serve(
            hello, cast("grpc.aio.ServicerContext[object, pb.DecodeReport]", context), request_iterator
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: pb.ListCachedBlocksRequest, context: "pb_grpc._ServicerContext"
    ) -> pb.ListCachedBlocksResponse:
        return await self._worker.list_cached()
