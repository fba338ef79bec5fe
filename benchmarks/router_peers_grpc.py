"""Trivial prefill workers for our own gateway, and a load generator: the counterpart of `router_peers_http`.

    python -m benchmarks.router_peers_grpc workers --redis-url URL --count 4 --cache-blocks 50000
    python -m benchmarks.router_peers_grpc load --address HOST:PORT < prompts.jsonl

The workers speak the worker protocol in full (streams, load reports, KV events, snapshots) and compute nothing. A block
of a prompt is `BLOCK_TOKENS` token ids that begin with its number; a request asks for one token, so that no decode
worker is needed and our gateway does what the peers do: it chooses one worker.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.lru_worker import LruWorker, WorkerShape
from core.clock import MonotonicClock
from core.errors import RejectReason, ServingError
from core.ids import Epoch, RequestId, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, KvEvent
from core.membership import LoadReport, Role, WorkerIdentity, WorkerRecord, WorkerState
from core.registration import Registration, RegistrationConfig
from core.request import FinishReason
from core.store import Store
from core.store_redis import RedisStore
from core.streams import Outbox
from protos import codec, worker_pb2, worker_pb2_grpc
from tandem_client import Client
from workers.rpc import Context, GatewayCalls, WorkerServer

CLUSTER = "router-peers"
BLOCK_TOKENS = 16
MAX_MODEL_LEN = 65_536
_VOCABULARY = 4000
_ROOT = b"root"
_LOAD_INTERVAL_S = 0.05


def prompt_tokens(blocks: list[int]) -> list[int]:
    """Return the token ids of a prompt: its blocks in full, and one token more: no whole prompt is ever cached."""
    tokens = []
    for number in blocks:
        digits = [number % _VOCABULARY, number // _VOCABULARY % _VOCABULARY]
        tokens += [*digits, *([1] * (BLOCK_TOKENS - len(digits)))]
    return [*tokens, 1]


class TrivialPrefillWorker(worker_pb2_grpc.PrefillWorkerServicer):
    """One worker on a port of its own. Implements `workers.rpc.Gateways`.

    Concurrency: one event loop.
    """

    def __init__(self, worker_id: WorkerId, shape: WorkerShape, store: Store) -> None:
        self.identity = WorkerIdentity(worker_id, Epoch(1), CLUSTER)
        self.cache = LruWorker(shape)
        self._streams: list[Outbox[worker_pb2.PrefillReport]] = []
        self._calls = GatewayCalls(self, hello_timeout_s=5.0)
        self._server = WorkerServer("127.0.0.1", 0)
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, self._server.grpc)
        self._queued_tokens = 0
        self._num_queued = 0
        self._sequence = 0
        self._held: dict[bytes, None] = {}
        record = WorkerRecord(
            worker_id=worker_id,
            role=Role.PREFILL,
            epoch=self.identity.epoch,
            state=WorkerState.READY,
            address=self._server.address,
            layout_fingerprint="trivial",
            weights_version="trivial",
            kv_bytes_per_token=1024,
            block_size=BLOCK_TOKENS,
            max_model_len=MAX_MODEL_LEN,
        )
        self._registration = Registration(
            store,
            CLUSTER,
            record,
            RegistrationConfig(lease_s=10.0),
            MonotonicClock(),
            encode=lambda batch: codec.kv_events_to_wire(batch).SerializeToString(),
            on_fenced=_unexpected,
            on_failed=_unexpected,
        )

    async def start(self) -> None:
        await self._server.start()
        self._registration.start()

    # gRPC allows a coroutine here, and its stubs do not know it.
    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.PrefillCommand], context: Context
    ) -> None:
        await self._calls.connect(
            request_iterator,
            context,
            worker_pb2.PrefillReport,
            handlers={"submit": self._submit},
            encode=lambda report: report,
        )

    async def ListCachedBlocks(  # noqa: N802
        self, request: worker_pb2.ListCachedBlocksRequest, context: Context
    ) -> worker_pb2.ListCachedBlocksResponse:
        return await self._calls.list_cached_blocks(context)

    async def ListKvDecisions(  # noqa: N802
        self, request: worker_pb2.ListKvDecisionsRequest, context: Context
    ) -> worker_pb2.ListKvDecisionsResponse:
        return worker_pb2.ListKvDecisionsResponse(worker_id=self.identity.worker_id, epoch=self.identity.epoch)

    def connect(self) -> Outbox[Any]:
        stream: Outbox[worker_pb2.PrefillReport] = Outbox(1 << 16)
        self._streams.append(stream)
        return stream

    def abort(self, stream: Outbox[Any], request_id: RequestId, reason: str) -> None:
        """Nothing to free."""

    def disconnect(self, stream: Outbox[Any]) -> None:
        self._streams.remove(stream)

    async def list_cached_blocks(self) -> tuple[int, list[BlocksStored]]:
        return self._registration.sequence, [BlocksStored(_ROOT, tuple(self._held))]

    async def tell_load(self) -> None:
        """Send a load report to every gateway now and then, as real workers do."""
        while True:
            load = self._load()
            for stream in self._streams:
                stream.put(worker_pb2.PrefillReport(load=load))
            await asyncio.sleep(_LOAD_INTERVAL_S)

    def _load(self) -> worker_pb2.WorkerLoad:
        self._sequence += 1
        load = LoadReport(
            sequence=self._sequence,
            num_running=min(1, self._num_queued),
            num_waiting=max(0, self._num_queued - 1),
            queued_prefill_tokens=self._queued_tokens,
        )
        return codec.load_to_wire(load)

    def _submit(self, stream: Outbox[Any], submit: worker_pb2.PrefillSubmit) -> None:
        request, now = submit.request, time.monotonic()
        if submit.HasField("max_queued_tokens") and self._queued_tokens > submit.max_queued_tokens:
            busier = worker_pb2.Rejected(request_id=request.request_id, reason=RejectReason.BUSIER, load=self._load())
            stream.put(worker_pb2.PrefillReport(rejected=busier))
            return
        served = self.cache.serve(list(request.block_hashes), now)
        cached_tokens = served.hit_blocks * BLOCK_TOKENS
        computed_tokens = len(request.prompt_token_ids) - cached_tokens
        self._queued_tokens += computed_tokens
        self._num_queued += 1
        accepted = worker_pb2.Accepted(request_id=request.request_id, cached_tokens=cached_tokens, load=self._load())
        stream.put(worker_pb2.PrefillReport(accepted=accepted))
        events: list[KvEvent] = []
        if served.stored:
            stored = tuple(block for block in served.stored if isinstance(block, bytes))
            self._held.update(dict.fromkeys(stored))
            events.append(BlocksStored(_ROOT, stored))
        if served.evicted:
            removed = tuple(block for block in served.evicted if isinstance(block, bytes))
            for block in removed:
                self._held.pop(block, None)
            events.append(BlocksRemoved(removed))
        if events:
            self._registration.publish(events)
        delay_s = max(0.0, served.done_at - now)
        finish = (stream, request.request_id, computed_tokens, cached_tokens, delay_s)
        asyncio.get_running_loop().call_later(delay_s, self._finish, *finish)

    def _finish(
        self, stream: Outbox[Any], request_id: str, computed_tokens: int, cached_tokens: int, waited_s: float
    ) -> None:
        self._queued_tokens -= computed_tokens
        self._num_queued -= 1
        token = worker_pb2.WorkOutput(request_id=request_id)
        token.tokens.add(index=0, token_id=5)
        token.finish.reason = codec.finish_reason_to_wire(FinishReason.LENGTH)
        shape_s = self.cache.service_s(computed_tokens // BLOCK_TOKENS)
        computed = worker_pb2.PrefillComputed(
            request_id=request_id,
            queue_s=max(0.0, waited_s - shape_s),
            compute_s=shape_s,
            cached_tokens=cached_tokens,
        )
        stream.put(worker_pb2.PrefillReport(outputs=worker_pb2.OutputBatch(outputs=[token])))
        stream.put(worker_pb2.PrefillReport(computed=computed))


def _unexpected(news: object) -> None:
    sys.exit(f"a trivial worker met {news!r}")


async def run_workers(options: argparse.Namespace) -> None:
    shape = WorkerShape(options.cache_blocks, options.request_ms / 1e3, options.block_ms / 1e3)
    store = RedisStore(options.redis_url, deadline_s=5.0)
    workers = [TrivialPrefillWorker(WorkerId(f"p{number}"), shape, store) for number in range(options.count)]
    for worker in workers:
        await worker.start()
    loads = [asyncio.create_task(worker.tell_load()) for worker in workers]
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):  # every line asks for the counts
        caches = [worker.cache for worker in workers]
        counts = [{"requests": one.num_requests, "blocks": one.num_blocks, "hits": one.num_hits} for one in caches]
        print(json.dumps(counts), flush=True)
    for load in loads:
        load.cancel()


async def run_load(options: argparse.Namespace) -> None:
    prompts = iter([json.loads(line) for line in sys.stdin])
    latencies: list[float] = []
    failures: dict[str, int] = {}
    async with Client(options.address, timeout_s=60.0) as client:

        async def one_by_one() -> None:
            for blocks in prompts:
                begun = time.monotonic()
                try:
                    async for _ in client.generate(prompt_tokens(blocks), max_tokens=1, ignore_eos=True):
                        pass
                    latencies.append(time.monotonic() - begun)
                except ServingError as error:
                    failures[str(error)] = failures.get(str(error), 0) + 1

        begun = time.monotonic()
        await asyncio.gather(*(one_by_one() for _ in range(options.concurrency)))
        wall_s = time.monotonic() - begun
    latencies.sort()
    middle = latencies[len(latencies) // 2] if latencies else None
    tail = latencies[int(len(latencies) * 0.99)] if latencies else None
    done = {"done": len(latencies), "failures": failures, "wall_s": wall_s, "p50_s": middle, "p99_s": tail}
    print(json.dumps(done), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    workers = commands.add_parser("workers")
    workers.add_argument("--redis-url", required=True)
    workers.add_argument("--count", type=int, required=True)
    workers.add_argument("--cache-blocks", type=int, required=True)
    workers.add_argument("--request-ms", type=float, default=0.0)
    workers.add_argument("--block-ms", type=float, default=0.0)
    load = commands.add_parser("load")
    load.add_argument("--address", required=True)
    load.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    asyncio.run(run_workers(options) if options.command == "workers" else run_load(options))


if __name__ == "__main__":
    main()
