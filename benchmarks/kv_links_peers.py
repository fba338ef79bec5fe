"""The two ends of the links benchmark, each a process in a network namespace of its own.

Both are slaves of the driver, line by line in JSON over stdin and stdout, which the shaped link does not carry. The
near end is a prefill worker whose engine waits instead of computing; the far end is a decode worker that only lands.
Both read the same monotonic clock (one machine), so arrival to landed needs no synchronisation.

    driver -> far    expect   requests of a run; answered when all are reserved
    driver -> near   prepare  open what a run needs and warm it up
    driver -> near   run      do it; answered when every transfer was acknowledged or has failed
    driver -> far    collect  when each landed, and how far the last one's KV is from what was sent

``python -m benchmarks.kv_links_peers near|far HOST RECORDED LIBRARY`` is started by the driver.
"""

import argparse
import asyncio
import json
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from benchmarks.kv_links_model import BLOCK_TOKENS, LandingPool, RecordedPool, layout_of_tiny, relative_error
from benchmarks.kv_links_policies import Recorded, Shelf, open_policy, open_shelf
from benchmarks.kv_links_workload import Request, Scenario, parts_of, requests_of
from core.clock import MonotonicClock
from core.errors import ServingError
from core.ids import Epoch, RequestId, TransferId, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from core.rpc import bind, create_server
from kv_transfer.choice import TransferTerms
from kv_transfer.config import KvTransferConfig
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import LandedStats, Peer
from kv_transfer.receiver import KvReceiver
from kv_transfer.rpc import add_kv_transfer
from kv_transfer.sender import KvSender

RUN_LIMIT_S = 150.0
LEASE_S = 300.0
_LANDING_TOKENS = 131_072

Reply = dict[str, Any]


def names_of(run: int, index: int) -> tuple[TransferId, RequestId]:
    return TransferId(f"links-{run}-{index}/0"), RequestId(f"links-{run}-{index}")


class Outcomes:
    """When each transfer of a run ended, by its index: on either side, on the event loop."""

    def __init__(self) -> None:
        self.ended_at: dict[int, float] = {}
        self.failures: dict[int, str] = {}
        self._changed = asyncio.Event()

    async def wait(self, indices: Iterable[int]) -> None:
        """Return when all of these have ended."""
        awaited = set(indices)
        while not awaited <= self.ended_at.keys():
            self._changed.clear()
            await self._changed.wait()

    def on_acked(self, transfer_id: TransferId) -> None:
        self._end(transfer_id)

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        self._end(transfer_id)

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self._end(transfer_id, f"{reason}: {detail}")

    def refuse(self, transfer_id: TransferId, detail: str) -> None:
        """Count a transfer that could not even begin."""
        self._end(transfer_id, detail)

    def _end(self, transfer_id: TransferId, failure: str = "") -> None:
        index = int(transfer_id.partition("/")[0].rpartition("-")[2])
        self.ended_at[index] = time.monotonic()
        if failure:
            self.failures[index] = failure
        self._changed.set()


class PacedEngine:
    """The prefill worker's engine: first come first served, in steps; it waits as long as a GPU would compute."""

    def __init__(self, scenario: Scenario, num_layers: int, sender: KvSender, run: int) -> None:
        self._tokens_per_s = scenario.prefill_tokens_per_s
        self._num_layers = num_layers
        self._sender = sender
        self._run = run
        self._arrived: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.first_token_at: dict[int, float] = {}
        self._free_at = 0.0
        self._thread = threading.Thread(target=self._work, name="engine")
        self._thread.start()

    def estimate_s(self, request: Request) -> float:
        """Return the seconds until the last part of a request will be there, if it is added now."""
        now = time.monotonic()
        return max(self._free_at, now) + request.prompt_tokens / self._tokens_per_s - now

    def add(self, request: Request) -> None:
        """Queue a request whose transfer has been offered."""
        self._free_at = max(self._free_at, time.monotonic()) + request.prompt_tokens / self._tokens_per_s
        self._arrived.put(request)

    def finish(self) -> None:
        self._arrived.put(None)

    def join(self) -> None:
        self._thread.join(RUN_LIMIT_S)

    def _work(self) -> None:
        free_at = 0.0  # by the pace, not by the clock: what the scheduler is late by does not add up
        while (request := self._arrived.get()) is not None:
            begun = max(free_at, time.monotonic())
            transfer_id, _ = names_of(self._run, request.index)
            parts = parts_of(request.prompt_tokens, self._num_layers)
            for layers, tokens in parts:
                done = tokens.start + len(tokens) * layers.stop / self._num_layers
                time.sleep(max(0.0, begun + done / self._tokens_per_s - time.monotonic()))
                self._sender.push(transfer_id, layers, tokens)
            self._sender.commit(transfer_id, 1)
            self.first_token_at[request.index] = time.monotonic()
            free_at = begun + request.prompt_tokens / self._tokens_per_s


class Near:
    """The prefill worker's end. A run gets a sender, a link, an engine and a chooser of its own."""

    def __init__(self, host: str, recorded: str, library: str) -> None:
        self._host = host
        self._layout = layout_of_tiny()
        self._shelf: Shelf = open_shelf(library, self._layout)
        self._pool = RecordedPool(self._layout, torch.load(recorded))
        self._run: NearRun | None = None

    async def start(self) -> Reply:
        return {}

    async def close(self) -> None:
        """Nothing outlives a run."""

    async def prepare(self, order: Mapping[str, Any]) -> Reply:
        scenario = Scenario.model_validate_json(order["scenario"])
        config = KvTransferConfig.model_validate({"host": self._host, "lease_s": LEASE_S, **order["config"]})
        chooser = open_policy(order["policy"], self._shelf, config, scenario.seed)
        self._run = NearRun(int(order["run"]), scenario, config, chooser, self._layout, self._pool, order["address"])
        await self._run.warm_up()
        return {}

    async def run(self, order: Mapping[str, Any]) -> Reply:
        assert self._run is not None
        start_at = float(order["start_at"])
        self._run.chooser.start([(start_at + at, floor, name) for at, floor, name in order["schedule"]])
        try:
            return await self._run.run(start_at)
        finally:
            await self._run.close()
            self._pool.tables.clear()


class NearRun:
    """One run: first some requests one at a time, then all of them at their times."""

    def __init__(
        self,
        run: int,
        scenario: Scenario,
        config: KvTransferConfig,
        chooser: Recorded,
        layout: KvLayout,
        pool: RecordedPool,
        address: str,
    ) -> None:
        self._name = run
        self._scenario = scenario
        self._layout = layout
        self.chooser = chooser
        self._requests = requests_of(scenario)
        self._outcomes = Outcomes()
        for request in self._requests:
            pool.place(names_of(run, request.index)[1], request.index, request.prompt_tokens)
        self._peer = Peer(WorkerId("far"), Epoch(1), address)
        self._sender = KvSender(
            config,
            WorkerIdentity(WorkerId("near"), Epoch(run), "benchmark"),
            layout,
            pool,
            self._outcomes,
            MonotonicClock(),
            metrics=KvTransferMetrics(CollectorRegistry()),
            chooser=chooser,
        )
        self._engine = PacedEngine(scenario, layout.num_layers, self._sender, run)

    async def warm_up(self) -> None:
        until = time.monotonic() + self._scenario.warm_up_s
        async with asyncio.timeout(RUN_LIMIT_S):
            for request in self._requests[: self._scenario.warm_up]:
                await self._begin(request)
                await self._outcomes.wait([request.index])
                if time.monotonic() > until:
                    break

    async def run(self, start_at: float) -> Reply:
        requests = self._requests[self._scenario.warm_up :]
        cpu_s = time.process_time()
        try:
            async with asyncio.timeout(RUN_LIMIT_S):
                for request in requests:
                    await asyncio.sleep(start_at + request.arrival_s - time.monotonic())
                    await self._begin(request)
                await self._outcomes.wait(request.index for request in requests)
        except TimeoutError:
            pass  # what has not ended is told as a failure
        cpu_s = time.process_time() - cpu_s
        self._engine.finish()
        return {"requests": [self._row(request, start_at) for request in requests], "cpu_s": cpu_s}

    async def close(self) -> None:
        await self._sender.close()
        self._engine.join()

    async def _begin(self, request: Request) -> None:
        """Offer a transfer, and queue the request at the engine, in this order: parts without an offer are lost."""
        transfer_id, request_id = names_of(self._name, request.index)
        terms = TransferTerms(request.quality_floor, compute_s=self._engine.estimate_s(request))
        try:
            await self._sender.offer(transfer_id, request_id, request.prompt_tokens, self._peer, terms)
        except ServingError as error:
            self._outcomes.refuse(transfer_id, f"{type(error).__name__}: {error}")
        else:
            self._engine.add(request)

    def _row(self, request: Request, start_at: float) -> Reply:
        transfer_id, _ = names_of(self._name, request.index)
        chooser, outcomes = self.chooser, self._outcomes
        choice, told = chooser.chosen.get(transfer_id), chooser.told.get(transfer_id)
        asked = chooser.asked.get(transfer_id)
        unended = "" if request.index in outcomes.ended_at else f"no outcome in {RUN_LIMIT_S:g} s"
        return {
            "arrived_at": start_at + request.arrival_s,
            "first_token_at": self._engine.first_token_at.get(request.index),
            "acked_at": outcomes.ended_at.get(request.index),
            "failure": outcomes.failures.get(request.index, unended),
            "floor": request.quality_floor,
            "profile": choice.profile if choice else "none",
            "is_exact": choice is None or choice.encoder.is_lossless,
            "reason": choice.reason if choice else "",
            "predicted_s": choice.predicted_s if choice else None,
            "observed_s": told.observed_s if told else None,
            "goodput": asked.link.goodput_bytes_per_s if asked else None,
            "raw_bytes": request.prompt_tokens * self._layout.bytes_per_token,
            "wire_bytes": told.payload_bytes if told else 0,
        }


class Far:
    """The decode worker's end: one receiver for all runs."""

    def __init__(self, host: str, recorded: str, library: str) -> None:
        self._layout = layout_of_tiny()
        self._sent = RecordedPool(self._layout, torch.load(recorded))
        self._pool = LandingPool(self._layout, _LANDING_TOKENS // BLOCK_TOKENS)
        self._host = host
        self._outcomes = Outcomes()
        config = KvTransferConfig.model_validate({"host": host, "lease_s": LEASE_S, "max_strays": 4096})
        identity = WorkerIdentity(WorkerId("far"), Epoch(1), "benchmark")
        self._receiver = KvReceiver(config, identity, self._layout, self._pool, self, MonotonicClock())
        self._server = create_server()
        self._run, self._requests, self._cpu_s = 0, list[Request](), 0.0

    def on_landed(self, transfer_id: TransferId, first_token_id: int, stats: LandedStats) -> None:
        self._outcomes.on_landed(transfer_id, first_token_id, stats)

    def on_failed(self, transfer_id: TransferId, reason: str, detail: str) -> None:
        self._outcomes.on_failed(transfer_id, reason, detail)

    async def start(self) -> Reply:
        add_kv_transfer(self._receiver, self._server)
        port = bind(self._server, self._host, 0)
        await self._server.start()
        return {"address": f"{self._host}:{port}"}

    async def close(self) -> None:
        await self._receiver.close()
        await self._server.stop(1.0)

    async def expect(self, order: Mapping[str, Any]) -> Reply:
        self._run, self._requests = int(order["run"]), requests_of(Scenario.model_validate_json(order["scenario"]))
        self._outcomes = Outcomes()
        self._pool.tables.clear()
        for request in self._requests:
            transfer_id, request_id = names_of(self._run, request.index)
            self._pool.place(request_id, request.prompt_tokens)
            await self._receiver.expect(transfer_id, request_id, 0, request.prompt_tokens, LEASE_S)
        self._cpu_s = time.process_time()
        return {}

    async def collect(self, order: Mapping[str, Any]) -> Reply:
        for request in self._requests:
            if request.index not in self._outcomes.ended_at:
                await self._receiver.cancel(names_of(self._run, request.index)[0], "the run is over")
        landed = {
            str(index): at for index, at in self._outcomes.ended_at.items() if index not in self._outcomes.failures
        }
        cpu_s = time.process_time() - self._cpu_s
        return {"landed": landed, "cpu_s": cpu_s, "relative_error": self._error_of_last(landed)}

    def _error_of_last(self, landed: Mapping[str, float]) -> float | None:
        """Compare the KV of the request whose blocks were given out last; nothing has overwritten it."""
        request = self._requests[-1]
        if str(request.index) not in landed:
            return None
        _, request_id = names_of(self._run, request.index)
        box = range(self._layout.num_layers), range(request.prompt_tokens)
        self._sent.place(request_id, request.index, request.prompt_tokens)
        return relative_error(self._pool.read(request_id, *box), self._sent.read_kv(request_id, *box))


async def serve(end: Near | Far) -> None:
    """Obey the driver until it closes stdin."""
    orders: dict[str, Callable[[Mapping[str, Any]], Awaitable[Reply]]]
    orders = (
        {"prepare": end.prepare, "run": end.run}
        if isinstance(end, Near)
        else {"expect": end.expect, "collect": end.collect}
    )
    _say(await end.start())
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        _say(await orders[order["op"]](order))
    await end.close()


def _say(reply: Reply) -> None:
    print(json.dumps(reply), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_links_peers", description=__doc__)
    parser.add_argument("role", choices=("near", "far"))
    parser.add_argument("host")
    parser.add_argument("recorded", help="KV as record_kv left it")
    parser.add_argument("library", help="auto, ladder, or the path of a library of profiles")
    args = parser.parse_args()
    torch.set_num_threads(1)

    async def live() -> None:
        await serve((Near if args.role == "near" else Far)(args.host, args.recorded, args.library))

    asyncio.run(live())


if __name__ == "__main__":
    main()
