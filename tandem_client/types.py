"""What a client is given: plain frozen facts, no protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from core.request import FinishReason


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood at some position."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `index` counts from 0 without gap."""

    index: int
    token_id: int
    logprob: float | None
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. queue + route + prefill = ttft."""

    queue_s: float
    route_s: float
    prefill_s: float
    transfer_s: float
    first_decode_s: float
    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Service:
    """What a request is for, and what it needs; what is left out is the cluster's to say.

    Attributes:
        service_class: interactive, deadline or batch.
        priority: against the tenant's own requests, -10 to 10, larger first.
        ttft_s, tpot_s: targets for the time to first token and per token after it. Seconds.
        deadline_s: target for the whole answer, from arrival. (How long the call may take is another thing.)
        session_id: requests of one session go to the same workers while that costs nothing.
    """

    service_class: str = ""
    priority: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who served the request and why, and what its KV cache cost on the way.

    Attributes:
        reason: why these workers; `mode_reason`: why this mode.
        mode: remote_prefill, local_prefill or colocated.
        binding: of a remote prefill, when the decode worker was chosen: early (before it began) or late.
        predicted_ttft_s, predicted_tpot_s: by the decision that was carried out.
        staleness_s: age of the shared state that the decision rested on.
        kv_bytes: of the KV that was sent, before compression; `kv_wire_bytes` is what crossed.
        kv_profile: compression profile; empty when nothing was transferred.
        kv_lossless: the KV that the decode worker went on from is equal bit for bit to the prefill worker's.
    """

    prefill_worker: str
    decode_worker: str
    reason: str
    attempts: int
    kv_bytes: int
    kv_tokens_sent: int
    kv_tokens_held: int
    kv_profile: str
    kv_lossless: bool = True
    kv_wire_bytes: int = 0
    mode: str = ""
    mode_reason: str = ""
    binding: str = ""
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0
    staleness_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """How a generation ended. `matched_stop` is the stop string or the id of the stop token that ended it."""

    request_id: str
    model: str
    seed: int
    finish_reason: FinishReason
    matched_stop: str | int | None
    usage: Usage
    timing: Timing
    placement: Placement


@dataclass(frozen=True, slots=True)
class Piece:
    """News of a generation. The last piece, and only it, has a summary.

    Attributes:
        request_id, seed: known from the first piece on.
        text: what became certain; may lag behind the tokens.
    """

    request_id: str
    seed: int
    text: str
    tokens: tuple[Token, ...]
    summary: Summary | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole generation."""

    text: str
    tokens: tuple[Token, ...]
    summary: Summary


@dataclass(frozen=True, slots=True)
class ModelInfo:
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
