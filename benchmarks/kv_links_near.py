"""The prefill worker's end of the links benchmark: the real sender, an engine that waits instead of computing."""

import asyncio
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from benchmarks.kv_links_model import RecordedPool, layout_of_tiny
from benchmarks.kv_links_outcomes import LEASE_S, RUN_LIMIT_S, Outcomes, Reply, names_of
from benchmarks.kv_links_policies import Recorded, Shelf, open_policy, open_shelf
from benchmarks.kv_links_workload import Request, Scenario, parts_of, requests_of
from core.clock import MonotonicClock
from core.errors import ServingError
from core.ids import Epoch, WorkerId
from core.layout import KvLayout
from core.membership import WorkerIdentity
from kv_transfer.choice import TransferTerms
from kv_transfer.codecs.warming import warm_up
from kv_transfer.config import KvTransferConfig
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.ports import Peer
from kv_transfer.sender.sender import KvSender


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
        warm_up(tuple(self._shelf.pipelines.values()), self._layout)
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
