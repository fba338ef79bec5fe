"""What a client is told about the cluster: plain frozen facts, no protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What clients need to know of the model served."""

    model: str
    weights_version: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the gateway sees it."""

    worker_id: str
    role: str
    epoch: int
    state: str
    detail: str
    address: str
    pid: int
    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    free_blocks: int
    total_blocks: int
    cached_blocks: int
    connected: bool
    in_flight: int
    metrics_port: int = 0


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    cluster: str
    model: str
    gateway_id: str
    store_staleness_s: float
    queued_requests: int
    active_requests: int
    workers: tuple[WorkerStatus, ...]


@dataclass(frozen=True, slots=True)
class KvDecision:
    """Which compression profile a KV transfer used, and why.

    Attributes:
        prefill_worker, peer: from where to where.
        age_s: since it was decided.
        predicted_s, observed_s: reserved to acknowledged; None while that is not known.
        wire_bytes: as coded; 0 while the transfer lives.
        failure: why it failed; empty otherwise.
        details: all that the worker keeps of it, with every candidate's terms.
    """

    prefill_worker: str
    peer: str
    transfer_id: str
    age_s: float
    profile: str
    reason: str
    quality_floor: float
    tenant: str
    num_tokens: int
    raw_bytes: int
    goodput_bytes_per_s: float
    predicted_s: float | None
    observed_s: float | None
    wire_bytes: int
    failure: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RouteCandidate:
    """One way to serve a request, and what it was expected to cost.

    Attributes:
        terms_s: what `total_s` is the sum of, by name.
        held_tokens: of the prompt, in the cache of the worker that would compute it.
    """

    prefill_worker: str
    decode_worker: str
    mode: str
    total_s: float
    terms_s: Mapping[str, float]
    predicted_ttft_s: float
    predicted_tpot_s: float
    held_tokens: int


@dataclass(frozen=True, slots=True)
class RouteOutcome:
    """What came of a decision. Seconds.

    Attributes:
        ttft_error_s: observed less predicted.
        regret_s: observed less what the best other candidate was predicted to cost; negative: well chosen.
        failure: why the request failed; empty otherwise.
    """

    ttft_s: float
    tpot_s: float
    transfer_s: float
    ttft_error_s: float
    regret_s: float
    failure: str


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Why a request was placed where it was. `candidates` has the winner among them, cheapest first.

    Attributes:
        num_eligible: workers that could be asked.
        decision_s: what the choice itself took.
        outcome: None while the request runs, and of a decision that was not carried out.
    """

    request_id: str
    age_s: float
    mode: str
    mode_reason: str
    reason: str
    binding: str
    winner: RouteCandidate
    candidates: tuple[RouteCandidate, ...]
    staleness_s: float
    outcome: RouteOutcome | None
    num_prompt_tokens: int
    expected_output_tokens: int
    num_eligible: int
    decision_s: float
