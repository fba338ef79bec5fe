"""A small cluster for tests of the routing policy: table, models, credit and policy, with a clock in hand."""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from router.index.slots import WorkerSlots
from router.routing.baselines import make_policy
from router.routing.config import RoutingConfig
from router.routing.credit import CreditLedger
from router.routing.decision import Decision, NoCandidate
from router.routing.models import Models
from router.routing.query import HeldPrefixes, RouteQuery
from router.routing.table import WorkerTable

START = 1000.0


@dataclass(slots=True)
class HandClock:
    """A clock that stands still until it is moved."""

    at: float = START

    def now(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.at += seconds


def load_report(sequence: int = 1, **fields: Any) -> LoadReport:
    return LoadReport.model_validate({"sequence": sequence, "free_blocks": 4000, "total_blocks": 4000, **fields})


def record(name: str, **changes: Any) -> WorkerRecord:
    """p... is a prefill worker, d... a decode worker; all on one host unless told."""
    fields: dict[str, Any] = {
        "worker_id": WorkerId(name),
        "role": Role.PREFILL if name.startswith("p") else Role.DECODE,
        "epoch": Epoch(1),
        "state": WorkerState.READY,
        "layout_fingerprint": "layout",
        "weights_version": "weights",
        "block_size": 16,
        "max_model_len": 100_000,
        "kv_bytes_per_token": 10_000,
        "host": "host",
        "load": load_report(),
        **changes,
    }
    return WorkerRecord.model_validate(fields)


class World:
    """Workers and a policy over them. Keyword arguments of the constructor are fields of the configuration."""

    def __init__(self, *workers: WorkerRecord | str, seed: int = 0, **config: Any) -> None:
        self.config = RoutingConfig.model_validate(config)
        self.clock = HandClock()
        self.rng = random.Random(seed)
        self.table = WorkerTable(self.config, WorkerSlots())
        self.models = Models(self.config, self.table, self.clock)
        self.credit = CreditLedger(self.config, self.table)
        self.policy = make_policy(self.config, self.models.links)
        for worker in workers:
            self.join(record(worker) if isinstance(worker, str) else worker)

    def join(self, worker: WorkerRecord) -> None:
        self.table.put(worker, self.clock.at)
        self.table.connected(worker.worker_id, worker.epoch)

    def slot(self, name: str) -> int:
        slot = self.table.find(WorkerId(name))
        assert slot is not None, name
        return slot

    def set(self, name: str, **columns: float) -> None:
        """Write columns of a worker's row."""
        for column, value in columns.items():
            self.table.rows[self.slot(name)][column] = value

    def query(
        self,
        *,
        held: dict[str, int] | None = None,
        in_host: dict[str, int] | None = None,
        hot: tuple[int, float] = (0, 0.0),
        **fields: Any,
    ) -> RouteQuery:
        """A prompt of 1,000 tokens. `held`: by worker, on the device; `in_host`: in any tier."""
        device = np.zeros(len(self.table.rows))
        for name, tokens in (held or {}).items():
            device[self.slot(name)] = tokens
        host = device.copy()
        for name, tokens in (in_host or {}).items():
            host[self.slot(name)] = max(tokens, host[self.slot(name)])
        made = RouteQuery(1000, 1100, HeldPrefixes(device, host, *hot), self.clock.at)
        return replace(made, **fields)

    def ask(self, query: RouteQuery | None = None) -> Decision | NoCandidate:
        return self.policy.choose(self.table, query or self.query(), self.rng)

    def place(self, query: RouteQuery | None = None) -> Decision:
        decision = self.ask(query)
        assert isinstance(decision, Decision), decision
        return decision

    def refuse(self, query: RouteQuery | None = None) -> tuple[Role, str]:
        outcome = self.ask(query)
        assert isinstance(outcome, NoCandidate), outcome
        return outcome.role, str(outcome.obstacle)
