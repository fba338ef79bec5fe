"""The decode worker's end of the links benchmark: the real receiver, a pool, and the time when each transfer landed."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.kv_links_model import BLOCK_TOKENS, LandingPool, RecordedPool, layout_of_tiny, relative_error
from benchmarks.kv_links_outcomes import LEASE_S, Outcomes, Reply, names_of
from benchmarks.kv_links_policies import open_shelf
from benchmarks.kv_links_workload import Request, Scenario, requests_of
from core.clock import MonotonicClock
from core.ids import Epoch, TransferId, WorkerId
from core.membership import WorkerIdentity
from core.rpc import bind, create_server
from kv_transfer.codecs.warming import warm_up
from kv_transfer.config import KvTransferConfig
from kv_transfer.ports import LandedStats
from kv_transfer.receiver.receiver import KvReceiver
from kv_transfer.rpc import add_kv_transfer

_LANDING_TOKENS = 131_072


class Far:
    """The decode worker's end: one receiver for all runs."""

    def __init__(self, host: str, recorded: str, library: str) -> None:
        self._layout = layout_of_tiny()
        warm_up(tuple(open_shelf(library, self._layout).pipelines.values()), self._layout)
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
