"""Who is in the cluster: the worker record (written by the worker under a lease) and its load report.

Kept in the store as JSON under `worker_key`; the lease is the key's time to live, renewed by the worker. A record
carries the worker's epoch: readers drop anything of an older epoch than the newest that they have seen.
"""

from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from core.ids import Epoch, WorkerId


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Which incarnation of which worker of which cluster a process is. Given to it by whoever started it."""

    worker_id: WorkerId
    epoch: Epoch
    cluster: str


class WorkerState(StrEnum):
    """Life of one incarnation, as the worker itself tells it."""

    STARTING = "starting"  # process is up, nothing loaded
    LOADING = "loading"  # weights are being read, KV pool allocated
    READY = "ready"  # accepts work
    DRAINING = "draining"  # finishes what it has, accepts nothing
    STOPPED = "stopped"  # left on purpose; the record goes with its lease


class LoadReport(BaseModel):
    """Load of a worker at the moment it was written; routers add what they dispatched since (in-flight credit)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int = Field(0, ge=0, description="grows with every report of one epoch")
    num_running: int = Field(0, ge=0, description="requests in the batch")
    num_waiting: int = Field(0, ge=0, description="accepted requests not yet in the batch")
    queued_prefill_tokens: int = Field(0, ge=0, description="accepted prompt tokens not yet computed")
    context_tokens: int = Field(0, ge=0, description="tokens of context over all running requests")
    free_blocks: int = Field(0, ge=0, description="blocks that a new request could take, evictable cache included")
    total_blocks: int = Field(0, ge=0)
    cached_blocks: int = Field(0, ge=0, description="blocks that the prefix cache owns")
    num_reserved: int = Field(0, ge=0, description="accepted requests of a decode worker whose KV has not landed")
    reserved_tokens: int = Field(0, ge=0, description="prompt tokens of those")
    prefill_tokens_per_s: float = Field(0.0, ge=0, description="recent rate; 0 when nothing was measured yet")
    decode_step_s: float = Field(0.0, ge=0, description="recent seconds per decode step; 0 when not measured yet")

    def with_rates_of(self, other: "LoadReport") -> "LoadReport":
        """Return these counts with the measured rates of another report."""
        return self.model_copy(
            update={"prefill_tokens_per_s": other.prefill_tokens_per_s, "decode_step_s": other.decode_step_s}
        )


class WorkerRecord(BaseModel):
    """One incarnation of a worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_id: WorkerId
    role: Role
    epoch: Epoch
    state: WorkerState
    detail: str = Field("", description="one line for people: what is being loaded, why it drains")
    address: str = Field("", description="host:port of the worker's gRPC server; empty until it listens")
    metrics_port: int = Field(0, ge=0, le=65535, description="of /metrics on the address's host; 0: not served")
    host: str = ""
    rack: str = Field("", description="as configured; workers of one rack share its switch; empty: not known")
    zone: str = Field("", description="as configured; empty: not known")
    pid: int = 0
    model: str = ""
    layout_fingerprint: str = ""
    weights_version: str = Field("", description="of the KV layout: root of the block hashes that gateways compute")
    dtype: str = ""
    engine_version: str = Field("", description="what generates its tokens: our version and that of torch")
    kv_bytes_per_token: int = Field(0, ge=0, description="of the KV layout: what a transfer moves per prompt token")
    block_size: int = 0
    max_model_len: int = 0
    load: LoadReport = LoadReport()

    def with_(self, **changes: object) -> "WorkerRecord":
        """Return a validated copy with some fields replaced."""
        return WorkerRecord.model_validate({**self.model_dump(), **changes})


def worker_prefix(cluster: str) -> str:
    return f"tandem:{cluster}:worker:"


def worker_key(cluster: str, worker_id: WorkerId) -> str:
    return f"{worker_prefix(cluster)}{worker_id}"


def epoch_key(cluster: str, worker_id: WorkerId) -> str:
    """Counter that hands out epochs; never expires."""
    return f"tandem:{cluster}:epoch:{worker_id}"


def kv_event_stream(cluster: str, worker_id: WorkerId) -> str:
    """Stream of the worker's KV event batches (bytes of `protos` KvEventBatch); epochs share the stream."""
    return f"tandem:{cluster}:kv:{worker_id}"


def kv_controller_key(cluster: str, role: Role) -> str:
    """What the profile controllers of one pool have learned, as bytes of theirs."""
    return f"tandem:{cluster}:kv_controller:{role}"
