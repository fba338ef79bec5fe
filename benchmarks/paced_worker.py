"""A worker that speaks the real protocol over real gRPC, takes as long as a model would, and computes nothing.

What both roles share: the server, the streams, the record under a lease and the KV events in the shared store (the
workers' own `core.registration`), a prefix cache of block hashes, and the load as every answer and report tells it.
Many of them fit into one process, so what all of them do is known exactly: `Floor` counts it.
"""

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc

from core.clock import MonotonicClock
from core.errors import RejectedError, RejectReason
from core.ids import Epoch, RequestId, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from core.registration import Registration, RegistrationConfig
from core.rpc import bind, create_server
from core.store import Store
from core.streams import Outbox
from protos import worker_pb2 as pb
from protos.codec import kv_events_to_wire, rejection_to_wire

Report = pb.PrefillReport | pb.DecodeReport
Submit = pb.PrefillSubmit | pb.DecodeSubmit
_REPORT_S = 0.1  # at most so often, when something changed
_HEARTBEAT_S = 1.0
_NO_PARENT = b"\0" * 16


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a worker is, and what it holds."""

    prefill_base_s: float = 0.01
    prefill_s_per_token: float = 0.0004
    transfer_s: float = 0.005
    step_base_s: float = 0.02
    step_s_per_request: float = 0.001
    max_requests: int = 32  # of a decode worker
    max_queued_tokens: int = 16_384  # of a prefill worker
    block_size: int = 16
    cache_blocks: int = 4096
    max_model_len: int = 2048


@dataclass(slots=True)
class Floor:
    """What the workers of one process share: who landed where, and what happened among them.

    Attributes:
        doubled: prompts that were accepted by a prefill worker with others queued while another one had none at all.
        most_held: the most that each worker held at once.
    """

    landings: dict[str, asyncio.Event] = field(default_factory=dict)
    prefills: list["PacedWorker"] = field(default_factory=list)
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    doubled: int = 0
    most_held: dict[WorkerId, int] = field(default_factory=dict)

    def landing(self, transfer_id: str) -> asyncio.Event:
        return self.landings.setdefault(transfer_id, asyncio.Event())


@dataclass(slots=True, eq=False)
class Work:
    """One request on one worker."""

    submit: Submit
    outbox: Outbox[Report]
    uncached_tokens: int = 0
    task: asyncio.Task[None] | None = None
    bound: asyncio.Event = field(default_factory=asyncio.Event)
    generates: bool = False  # the rest of it, here

    @property
    def request(self) -> pb.WorkRequest:
        return self.submit.request

    @property
    def work_id(self) -> str:
        return self.submit.request.request_id


class PacedWorker(ABC):
    """One incarnation."""

    role: Role

    def __init__(self, name: str, floor: Floor, store: Store, cluster: str, pace: Pace) -> None:
        self.worker_id = WorkerId(name)
        self.works: dict[str, Work] = {}
        self._floor = floor
        self._store = store
        self._cluster = cluster
        self._pace = pace
        self._epoch = Epoch(1)
        self._outboxes: set[Outbox[Report]] = set()
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()  # parents; a block is older than those above it
        self._load_sequence = 0
        self._is_stale = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._registration: Registration | None = None
        self._reporter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, register as ready."""
        self._server = create_server()
        self._add_to(self._server)
        address = f"127.0.0.1:{bind(self._server, '127.0.0.1', 0)}"
        await self._server.start()
        pace = self._pace
        record = WorkerRecord(
            worker_id=self.worker_id, role=self.role, epoch=self._epoch, state=WorkerState.READY, address=address,
            model="paced", layout_fingerprint="paced", weights_version="paced", dtype="float32",
            kv_bytes_per_token=1024, block_size=pace.block_size, max_model_len=pace.max_model_len, load=self._load(),
        )  # fmt: skip
        self._registration = Registration(
            self._store,
            self._cluster,
            record,
            RegistrationConfig(),
            MonotonicClock(),
            encode=lambda batch: kv_events_to_wire(batch).SerializeToString(),
            on_fenced=lambda epoch: None,
            on_failed=lambda error: None,
        )
        self._registration.start()
        self._reporter = asyncio.create_task(self._report_loads(), name=f"loads of {self.worker_id}")

    async def stop(self) -> None:
        """End everything; the record goes."""
        for task in (self._reporter, *(work.task for work in self.works.values())):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._registration is not None:
            await self._registration.stop(1.0)
        if self._server is not None:
            await self._server.stop(None)

    # --- one gateway's stream ---

    async def serve(
        self, commands: AsyncIterator[pb.PrefillCommand] | AsyncIterator[pb.DecodeCommand]
    ) -> AsyncIterator[Report]:
        """Answer one gateway until its stream ends; then free what came over it."""
        outbox: Outbox[Report] = Outbox(100_000)
        outbox.put(self._wrap(welcome=pb.Welcome(worker_id=self.worker_id, epoch=self._epoch)))
        reading = asyncio.create_task(self._read(commands, outbox), name=f"commands of {self.worker_id}")
        reading.add_done_callback(lambda _: outbox.close())
        self._outboxes.add(outbox)
        self._is_stale.set()
        try:
            async for report in outbox:
                yield report
        finally:
            self._outboxes.discard(outbox)
            outbox.close()
            reading.cancel()
            for work in [work for work in self.works.values() if work.outbox is outbox]:
                self.free(work.work_id)
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await reading

    async def _read(
        self,
        commands: AsyncIterator[pb.PrefillCommand] | AsyncIterator[pb.DecodeCommand],
        outbox: Outbox[Report],
    ) -> None:
        async for command in commands:
            if command.HasField("abort"):
                self.free(command.abort.request_id)
            elif command.HasField("submit"):
                self._take(command.submit, outbox)
            elif isinstance(command, pb.PrefillCommand) and command.HasField("bind"):
                work = self.works.get(command.bind.request_id)
                if work is not None:
                    work.generates = not command.bind.decode_worker_id
                    work.bound.set()

    def _take(self, submit: Submit, outbox: Outbox[Report]) -> None:
        work = Work(submit, outbox, self.uncached(submit.request))
        refusal = self._refusal(submit)
        if refusal is not None:
            error = RejectedError(refusal, "paced", 0.0)
            name = str(refusal)
            self._floor.refused[name] = self._floor.refused.get(name, 0) + 1
            outbox.put(self._wrap(rejected=rejection_to_wire(RequestId(work.work_id), error, self._load())))
            return
        self._floor.accepted += 1
        if self.role is Role.PREFILL and self.works and not all(one.works for one in self._floor.prefills):
            self._floor.doubled += 1
        self.works[work.work_id] = work
        held = len(self.works)
        self._floor.most_held[self.worker_id] = max(held, self._floor.most_held.get(self.worker_id, 0))
        cached = len(submit.request.prompt_token_ids) - work.uncached_tokens
        load = pb.WorkerLoad(**self._load().model_dump())
        outbox.put(self._wrap(accepted=pb.Accepted(request_id=work.work_id, cached_tokens=cached, load=load)))
        work.task = asyncio.create_task(self._run(work), name=f"{self.worker_id}: {work.work_id}")
        self._is_stale.set()

    async def _run(self, work: Work) -> None:
        try:
            await self._work(work)
        finally:
            self.works.pop(work.work_id, None)
            self._is_stale.set()

    def free(self, work_id: str) -> None:
        """Stop a work, if it is here."""
        work = self.works.get(work_id)
        if work is not None and work.task is not None:
            work.task.cancel()

    # --- cache and load ---

    def uncached(self, request: pb.WorkRequest) -> int:
        """Return how many prompt tokens are left to compute: at least one."""
        held = 0
        for block in request.block_hashes:
            if block not in self._cache:
                break
            held += self._pace.block_size
        return max(1, len(request.prompt_token_ids) - held)

    def remember(self, hashes: Sequence[bytes]) -> None:
        """The blocks of a prompt are in the cache now; the longest unused make room, the tail of a chain first."""
        parents = [_NO_PARENT, *hashes[:-1]]
        start = next((n for n, block in enumerate(hashes) if block not in self._cache), len(hashes))
        for n in reversed(range(len(hashes))):
            self._cache[hashes[n]] = parents[n]
            self._cache.move_to_end(hashes[n])
        gone = []
        while len(self._cache) > self._pace.cache_blocks:
            gone.append(self._cache.popitem(last=False)[0])
        assert self._registration is not None
        stored = [BlocksStored(parents[start], tuple(hashes[start:]))] if start < len(hashes) else []
        self._registration.publish([*stored, *([BlocksRemoved(tuple(gone))] if gone else [])])

    async def list_cached(self) -> pb.ListCachedBlocksResponse:
        """Return the cache for a gateway that starts, a block after those above it."""
        sequence = self._registration.sequence if self._registration is not None else 0
        chains = [
            pb.CachedChain(parent=self._cache[block], hashes=[block], tier=pb.CACHE_TIER_DEVICE)
            for block in reversed(self._cache)
        ]
        return pb.ListCachedBlocksResponse(
            worker_id=self.worker_id, epoch=self._epoch, sequence=sequence, chains=chains
        )

    def _load(self) -> LoadReport:
        self._load_sequence += 1
        return LoadReport(sequence=self._load_sequence, **self._facts())

    async def _report_loads(self) -> None:
        while True:
            self._is_stale.clear()
            load = pb.WorkerLoad(**self._load().model_dump())
            for outbox in self._outboxes:
                outbox.put(self._wrap(load=load))
            await asyncio.sleep(_REPORT_S * random.uniform(0.8, 1.0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_S):
                    await self._is_stale.wait()

    @abstractmethod
    def _add_to(self, server: grpc.aio.Server) -> None: ...

    @abstractmethod
    def _refusal(self, submit: Submit) -> RejectReason | None:
        """Return why the worker refuses a work now."""

    @abstractmethod
    async def _work(self, work: Work) -> None:
        """Do it, telling its outbox."""

    @abstractmethod
    def _facts(self) -> dict[str, int | float]:
        """Return the fields of the load report."""

    @abstractmethod
    def _wrap(
        self,
        *,
        welcome: pb.Welcome | None = None,
        accepted: pb.Accepted | None = None,
        rejected: pb.Rejected | None = None,
        load: pb.WorkerLoad | None = None,
    ) -> Report:
        """Return the report of this role that carries the message."""
