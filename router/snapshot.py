"""What the routing policy sees: frozen facts about workers and about one request. Made by the shell, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass

from core.ids import Epoch, WorkerId
from core.membership import LoadReport, Role, WorkerState


@dataclass(frozen=True, slots=True)
class Credit:
    """What this gateway sent to a worker and no load report of the worker can include yet."""

    num_requests: int = 0
    prefill_tokens: int = 0  # of prompts, minus the prefix that the worker holds
    context_tokens: int = 0  # of whole prompts


NO_CREDIT = Credit()
NO_LOAD = LoadReport()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as known now.

    Attributes:
        connected_epoch: of the live stream to it; None without one.
        decode_scale: how much slower (> 1) than the configured decode model its steps were measured.
        prefill_tokens_per_s: measured or default, > 0.
    """

    worker_id: WorkerId
    role: Role
    epoch: Epoch
    state: WorkerState
    connected_epoch: Epoch | None
    layout_fingerprint: str
    block_size: int
    max_model_len: int
    kv_bytes_per_token: int
    prefill_tokens_per_s: float
    decode_scale: float = 1.0
    load: LoadReport = NO_LOAD
    credit: Credit = NO_CREDIT

    @property
    def is_live(self) -> bool:
        """Ready, and this gateway holds a stream to this very incarnation."""
        return self.state is WorkerState.READY and self.connected_epoch == self.epoch


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All workers, in any order, and what the pairs' links were seen to do.

    Attributes:
        staleness_s: age of the mirror of the shared store behind it.
        link_s_per_byte: seconds per KV byte that a (prefill, decode) pair exposed lately; pairs without are unknown.
    """

    workers: tuple[WorkerView, ...]
    staleness_s: float
    link_s_per_byte: Mapping[tuple[WorkerId, WorkerId], float]
    default_link_s_per_byte: float


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """One request to place.

    Attributes:
        max_total_tokens: prompt and everything it may generate.
        needs_decode: False when the first token is the last.
        held_tokens: prompt tokens whose KV each worker has in its prefix cache; absent is none.
        refused: workers not to be asked (again) in this round.
        reserved_decode: the decode worker that accepted already; only the prefill worker is open then.
    """

    num_prompt_tokens: int
    max_total_tokens: int
    needs_decode: bool
    held_tokens: Mapping[WorkerId, int]
    refused: frozenset[WorkerId] = frozenset()
    reserved_decode: WorkerId | None = None
