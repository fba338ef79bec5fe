"""What the fake prefill and decode workers share: they speak the real gRPC protocol and compute nothing.

A `FakeNetwork` joins them: it says what the model "generates" and carries a prefill worker's hand-over to the decode
worker that reserved for it. Tests steer by events: a worker can be told to refuse, to keep silent, to hold back tokens,
to die. It counts what it holds, tells it in every answer, and refuses a conditional question when that is too much.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

import grpc

from core.errors import RejectedError, RejectReason, StoreUnavailable
from core.ids import Epoch, RequestId, WorkerId
from core.kv_events import BlocksStored, KvEvent, KvEventBatch
from core.membership import LoadReport, Role, WorkerRecord, WorkerState, kv_event_stream, worker_key
from core.request import PromptToken, RequestOutput, TokenLogprob, TokenOutput
from core.rpc import bind, create_server
from core.store import Store
from core.streams import Outbox
from protos import worker_pb2 as pb
from protos.codec import kv_events_to_wire, load_to_wire, outputs_to_wire, rejection_to_wire
from tests.fakes.script import PATIENCE_S, FakeNetwork, Reply, WorkerScript, client_id

WEIGHTS_VERSION = "fake-weights"
BLOCK_SIZE = 4
LAYOUT = "layout-a"

Report = TypeVar("Report", pb.PrefillReport, pb.DecodeReport)


class FakeWorker(Generic[Report]):
    """Server, record, streams, bookkeeping."""

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
        self.binds: list[pb.PrefillBind] = []
        self.spent: set[str] = set()  # transfers that it expected: a real receiver remembers those that ended, too
        self.held: set[str] = set()  # request ids that occupy this worker
        self.queued: dict[str, int] = {}  # prompt tokens of those that it computes and has not yet
        self.steps_allowed = asyncio.Semaphore(1_000_000)
        """Every token after the first takes one; a test that wants to stop in mid-stream replaces it."""
        self._store = store
        self._cluster = cluster
        self._layout = layout
        self.max_model_len = max_model_len
        self._server: grpc.aio.Server | None = None
        self._address = ""
        self._works: dict[str, asyncio.Task[None]] = {}
        self._sequence = 0
        self._load_sequence = 0
        self._chains: list[BlocksStored] = []
        self._changed = asyncio.Condition()
        self._outboxes: list[Outbox[Report]] = []

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

    def load(self) -> LoadReport:
        """Return what it holds now, on top of what its script pretends."""
        self._load_sequence += 1
        own = self.script.pretended_load
        return own.model_copy(
            update={
                "sequence": self._load_sequence,
                "queued_prefill_tokens": own.queued_prefill_tokens + sum(self.queued.values()),
                "num_waiting": own.num_waiting + len(self.queued),
                "num_running": own.num_running + len(self.held - self.queued.keys()),
            }
        )

    def tell_load(self) -> None:
        """Report the load to every gateway, as a real worker does now and then."""
        for outbox in self._outboxes:
            outbox.put(self._load_report(load_to_wire(self.load())))

    async def list_cached(self) -> pb.ListCachedBlocksResponse:
        chains = [
            pb.CachedChain(parent=chain.parent, hashes=chain.hashes, tier=pb.CACHE_TIER_DEVICE)
            for chain in self._chains
        ]
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
        self._outboxes.append(outbox)
        works: list[str] = []
        reader = asyncio.create_task(self._read(commands, outbox, works))
        reader.add_done_callback(lambda _: outbox.close())
        try:
            async for report in outbox:
                await context.write(report)
        finally:
            reader.cancel()
            self._outboxes.remove(outbox)
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
                case "bind":
                    assert isinstance(command, pb.PrefillCommand)
                    self.binds.append(command.bind)
            await self.note()

    def _take(self, submit: pb.PrefillSubmit | pb.DecodeSubmit, outbox: Outbox[Report], works: list[str]) -> None:
        if self.script.is_silent:
            return
        request_id = submit.request.request_id
        refused = self.script.next_refusal() or self._busier(submit)
        if refused is not None:
            outbox.put(self._rejected(rejection_to_wire(RequestId(request_id), refused, self.load())))
            return
        self.held.add(request_id)
        works.append(request_id)
        cached = self._cached_tokens(submit.request)
        if isinstance(submit, pb.PrefillSubmit) or submit.generate:
            self.queued[request_id] = len(submit.request.prompt_token_ids) - cached
        load = load_to_wire(self.load())
        outbox.put(self._accepted(pb.Accepted(request_id=request_id, cached_tokens=cached, load=load)))
        task = asyncio.create_task(self._work(submit, outbox))
        self._works[request_id] = task
        task.add_done_callback(lambda _: self._works.pop(request_id, None))

    def _busier(self, submit: pb.PrefillSubmit | pb.DecodeSubmit) -> RejectedError | None:
        load = self.load()
        if submit.HasField("max_queued_tokens") and load.queued_prefill_tokens > submit.max_queued_tokens:
            return RejectedError(RejectReason.BUSIER, f"{load.queued_prefill_tokens} tokens are queued")
        held = load.num_running + load.num_waiting
        if (
            isinstance(submit, pb.DecodeSubmit)
            and submit.HasField("max_requests_held")
            and held > submit.max_requests_held
        ):
            return RejectedError(RejectReason.BUSIER, f"{held} requests are held")
        return None

    def _cached_tokens(self, request: pb.WorkRequest) -> int:
        known = {block for chain in self._chains for block in chain.hashes}
        held = 0
        for block in request.block_hashes:
            if block not in known:
                break
            held += BLOCK_SIZE
        return held

    def _free(self, request_id: str) -> None:
        self.drop(request_id)
        task = self._works.get(request_id)
        if task is not None:
            task.cancel()

    def drop(self, request_id: str) -> None:
        """The request occupies this worker no more."""
        self.held.discard(request_id)
        self.queued.pop(request_id, None)

    async def _fail(self, request_id: str) -> pb.WorkFailed | None:
        """Wait for leave to go on; return the failure if the script has one."""
        await self.script.go.wait()
        if self.script.failure is None:
            return None
        failure = pb.WorkFailed()
        failure.CopyFrom(self.script.failure)
        failure.request_id = request_id
        self.drop(request_id)
        return failure

    def _first_token(self, request: pb.WorkRequest, reply: Reply) -> tuple[pb.OutputBatch, pb.PrefillComputed]:
        """Compute the prompt."""
        request_id = RequestId(request.request_id)
        self.queued.pop(request_id, None)
        finish = reply.finish if len(reply.token_ids) == 1 else None
        output = RequestOutput(request_id, self._tokens(request, reply, 0, 1), finish, _scores(request))
        cached = self._cached_tokens(request)
        measured = pb.PrefillComputed(request_id=request_id, queue_s=0.001, compute_s=0.002, cached_tokens=cached)
        return outputs_to_wire([output]), measured

    async def _keep_prompt(self, request: pb.WorkRequest) -> None:
        """The prompt's blocks are in the cache now."""
        if request.block_hashes and self._cached_tokens(request) < len(request.block_hashes) * BLOCK_SIZE:
            await self.publish(BlocksStored(b"\0" * 16, tuple(request.block_hashes)))

    async def _steps(self, request: pb.WorkRequest, reply: Reply) -> AsyncIterator[pb.OutputBatch]:
        """Take the steps after the first token, one by one."""
        for index in range(1, len(reply.token_ids)):
            await self.steps_allowed.acquire()
            is_last = index == len(reply.token_ids) - 1
            tokens = self._tokens(request, reply, index, index + 1)
            if is_last:
                self.drop(request.request_id)
            finish = reply.finish if is_last else None
            yield outputs_to_wire([RequestOutput(RequestId(request.request_id), tokens, finish)])

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

    def _load_report(self, load: pb.WorkerLoad) -> Report:
        raise NotImplementedError


def _scores(request: pb.WorkRequest) -> tuple[PromptToken, ...]:
    """The prompt, scored by a model that is the less sure the longer it gets."""
    if not request.sampling.HasField("prompt_logprobs"):
        return ()
    tops = tuple(TokenLogprob(index, -1.0 - index) for index in range(request.sampling.prompt_logprobs))
    first, *others = request.prompt_token_ids
    scored = (PromptToken(one, -0.25 * place, tops) for place, one in enumerate(others, start=1))
    return (PromptToken(first, None), *scored)
