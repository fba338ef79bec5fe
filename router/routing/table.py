"""All workers as one gateway knows them: an array with a row per slot, changed as news come, read by the policies.

The fleet tells it of records, connections, loads; breakers and other gateways write their columns. What machines do is
fitted elsewhere (`router.routing.models`) and what was just sent is counted elsewhere (`router.routing.credit`): both
write columns here, and are told when an incarnation ends. A decision reads the whole array within one synchronous call,
so nothing is copied for it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerRecord, WorkerState
from router.index.slots import WorkerSlots
from router.prompt_hashes import HashKey
from router.routing.columns import WORKER, RoleCode
from router.routing.config import RoutingConfig
from router.routing.forecast import DecodeForecast
from router.routing.topology import Codes

_ROLES = {Role.PREFILL: RoleCode.PREFILL, Role.DECODE: RoleCode.DECODE}


@dataclass(frozen=True, slots=True)
class Credit:
    """What was sent to a worker and no load report of the worker can include yet."""

    num_requests: int = 0
    prefill_tokens: int = 0  # of prompts, minus the prefix that the worker holds
    context_tokens: int = 0  # of whole prompts
    prefill_s: float = 0.0  # what computing them takes there


NO_CREDIT = Credit()


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker, for people and metrics."""

    record: WorkerRecord
    load: LoadReport
    connected_epoch: Epoch | None
    is_live: bool
    breaker_open: bool
    heard_at: float
    credit: Credit
    peer_credit: Credit


class WorkerTable:
    """The rows.

    Concurrency: one thread.

    Attributes:
        rows: structured array (`columns.WORKER`) [slots]. May be replaced when workers come: never keep it.
        on_reset: called with a slot whenever an incarnation came to it or left it: its row is cleared but for the role.
    """

    def __init__(self, config: RoutingConfig, slots: WorkerSlots) -> None:
        self._slots = slots
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._loads: dict[WorkerId, LoadReport] = {}
        self._connected: dict[WorkerId, Epoch] = {}
        self._hash_codes: dict[HashKey, int] = {}
        self._hash_users: Counter[HashKey] = Counter()
        self._layouts, self._hosts, self._racks, self._zones = Codes(), Codes(), Codes(), Codes()
        self.rows = np.zeros(0, WORKER)
        self.forecast = DecodeForecast(config.forecast_bucket_s)
        self.on_reset: list[Callable[[int], None]] = []

    @property
    def slots(self) -> WorkerSlots:
        return self._slots

    @property
    def hash_keys(self) -> Mapping[HashKey, int]:
        """Every way to hash prompts that some worker uses, with its code in the rows."""
        return self._hash_codes

    def find(self, worker_id: WorkerId) -> int | None:
        """Return the slot of a worker that has a row."""
        return self._slots.find(worker_id) if worker_id in self._records else None

    def put(self, record: WorkerRecord, now: float) -> None:
        """A record came or changed. Another epoch than before forgets all that was known of the old incarnation."""
        worker_id = record.worker_id
        known = self._records.get(worker_id)
        hash_code = self._hash_code(_hash_key(record))  # before the old one is free: the same more often than not
        if known is not None:
            self._leave_hash_key(known)
        slot = self._slots.of(worker_id)
        self._ensure(slot)
        self._records[worker_id] = record
        if known is None or known.epoch != record.epoch:
            self._loads.pop(worker_id, None)
            self._reset(slot, _ROLES[record.role])
            self.rows[slot]["heard_at"] = now
        row = self.rows[slot]
        row["role"] = _ROLES[record.role]
        row["hash_key"] = hash_code
        row["layout"] = self._layouts.of(record.layout_fingerprint)
        row["block_size"] = record.block_size
        row["max_model_len"] = record.max_model_len
        row["kv_bytes_per_token"] = record.kv_bytes_per_token
        row["host"] = self._hosts.of(record.host)
        row["rack"] = self._racks.of(record.rack)
        row["zone"] = self._zones.of(record.zone)
        self._refresh_live(worker_id)
        self.report(worker_id, record.load, now)

    def drop(self, worker_id: WorkerId) -> None:
        """The record left."""
        slot = self.find(worker_id)
        if slot is None:
            return
        self._leave_hash_key(self._records.pop(worker_id))
        self._loads.pop(worker_id, None)
        self._reset(slot, RoleCode.NONE)
        self._slots.release(worker_id)

    def connected(self, worker_id: WorkerId, epoch: Epoch) -> None:
        self._connected[worker_id] = epoch
        self._refresh_live(worker_id)

    def disconnected(self, worker_id: WorkerId) -> None:
        self._connected.pop(worker_id, None)
        self._refresh_live(worker_id)

    def report(self, worker_id: WorkerId, load: LoadReport, now: float) -> None:
        """Take the load of the incarnation that is known, unless a newer one was taken before."""
        slot = self.find(worker_id)
        known = self._loads.get(worker_id)
        if slot is None or (known is not None and load.sequence <= known.sequence):
            return
        self._loads[worker_id] = load
        row = self.rows[slot]
        landed_waiting = max(0, load.num_waiting - load.num_reserved)
        row["heard_at"] = row["reported_at"] = now
        row["queued_tokens"] = load.queued_prefill_tokens
        row["requests"] = load.num_running + load.num_waiting
        # A batch may hold requests that generate, and nobody waits for those to be computed: it counts as one prompt.
        row["prompts"] = landed_waiting + (load.num_running > 0 and load.queued_prefill_tokens > 0)
        row["running"] = load.num_running + (landed_waiting if row["role"] == RoleCode.DECODE else 0)
        row["context_tokens"] = load.context_tokens
        row["reserved"] = load.num_reserved
        row["reserved_tokens"] = load.reserved_tokens
        row["free_blocks"] = load.free_blocks
        row["total_blocks"] = load.total_blocks

    def set_breaker(self, worker_id: WorkerId, is_open: bool) -> None:
        slot = self.find(worker_id)
        if slot is not None:
            self.rows[slot]["breaker_open"] = is_open

    def set_peer_credit(self, worker_id: WorkerId, epoch: Epoch, credit: Credit) -> None:
        """What all other gateways sent there that no report of this incarnation can include yet."""
        slot = self.find(worker_id)
        if slot is None or self._records[worker_id].epoch != epoch:
            return
        row = self.rows[slot]
        row["peer_requests"] = credit.num_requests
        row["peer_prefill_tokens"] = credit.prefill_tokens
        row["peer_context_tokens"] = credit.context_tokens
        row["peer_prefill_s"] = credit.prefill_s

    def count_live(self) -> dict[Role, int]:
        """Return how many workers of each role can be asked now."""
        live = self.rows["role"] * self.rows["is_live"]
        return {role: int(np.count_nonzero(live == code)) for role, code in _ROLES.items()}

    def credit(self, slot: int, of: str = "credit") -> Credit:
        """Return the credit columns of a row; of="peer": those of other gateways."""
        row = self.rows[slot]
        return Credit(
            int(row[f"{of}_requests"]),
            int(row[f"{of}_prefill_tokens"]),
            int(row[f"{of}_context_tokens"]),
            float(row[f"{of}_prefill_s"]),
        )

    def row(self, worker_id: WorkerId) -> WorkerRow | None:
        slot = self.find(worker_id)
        if slot is None:
            return None
        row, record = self.rows[slot], self._records[worker_id]
        return WorkerRow(
            record=record,
            load=self._loads.get(worker_id, record.load),
            connected_epoch=self._connected.get(worker_id),
            is_live=bool(row["is_live"]),
            breaker_open=bool(row["breaker_open"]),
            heard_at=float(row["heard_at"]),
            credit=self.credit(slot),
            peer_credit=self.credit(slot, "peer"),
        )

    def check(self) -> None:
        """Assert that every row belongs to a known worker and that no count is negative."""
        for slot in np.flatnonzero(self.rows["role"]):
            worker_id = self._slots.worker(int(slot))
            assert worker_id in self._records, f"slot {slot} has a row and no worker"
        for name in ("credit_requests", "credit_context_tokens", "own_reserved", "due_requests", "due_tokens"):
            assert (self.rows[name] >= 0).all(), name
        assert (self.forecast.joins >= 0).all()

    def _hash_code(self, key: HashKey) -> int:
        """Count one more worker that uses `key`; return its code."""
        self._hash_users[key] += 1
        code = self._hash_codes.get(key)
        if code is None:
            taken = self._hash_codes.values()
            code = self._hash_codes[key] = next(code for code in range(len(taken) + 1) if code not in taken)
        return code

    def _leave_hash_key(self, record: WorkerRecord) -> None:
        key = _hash_key(record)
        self._hash_users[key] -= 1
        if not self._hash_users[key]:
            del self._hash_users[key], self._hash_codes[key]

    def _refresh_live(self, worker_id: WorkerId) -> None:
        slot = self.find(worker_id)
        if slot is not None:
            record = self._records[worker_id]
            is_live = record.state is WorkerState.READY and self._connected.get(worker_id) == record.epoch
            self.rows[slot]["is_live"] = is_live

    def _ensure(self, slot: int) -> None:
        if slot < len(self.rows):
            return
        size = max(16, len(self.rows) * 2, slot + 1)
        wider = np.zeros(size, WORKER)
        wider[: len(self.rows)] = self.rows
        self.rows = wider
        self.forecast.grow(size)

    def _reset(self, slot: int, role: RoleCode) -> None:
        self.rows[slot] = np.zeros((), WORKER)
        self.rows[slot]["role"] = role
        self.forecast.clear(slot)
        for call in self.on_reset:
            call(slot)


def _hash_key(record: WorkerRecord) -> HashKey:
    return HashKey(record.weights_version, record.block_size)
