"""The one cost of a placement, in seconds, term by term. Pure.

    queue     accepted prompt tokens not yet computed, credit included / measured prefill rate
    prefill   prompt tokens that the prefill worker does not hold / the same rate
    transfer  KV bytes that the decode worker does not hold * the pair's seconds per byte
    decode    expected steps * predicted step with this request in the batch; doubled when its blocks are not free

All terms are floats and grow (never fall) with load. A term that is the same for all candidates changes nothing, so the
step of an empty batch may stand in `decode`.
"""

from dataclasses import dataclass

from core.blocks import num_blocks
from core.ids import WorkerId
from router.config import RoutingConfig
from router.snapshot import ClusterSnapshot, RouteQuery, WorkerView


@dataclass(frozen=True, slots=True)
class CostTerms:
    """Seconds. A prefill-only placement has no transfer and no decode."""

    queue_s: float
    prefill_s: float
    transfer_s: float = 0.0
    decode_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.transfer_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement and what it is expected to cost."""

    prefill: WorkerId
    decode: WorkerId | None
    terms: CostTerms


def uncached_tokens(worker: WorkerView, query: RouteQuery) -> int:
    """Prompt tokens left to compute: at least one, since the last token must be computed to sample the first."""
    return max(1, query.num_prompt_tokens - query.held_tokens.get(worker.worker_id, 0))


def queue_s(worker: WorkerView) -> float:
    return (worker.load.queued_prefill_tokens + worker.credit.prefill_tokens) / worker.prefill_tokens_per_s


def prefill_s(worker: WorkerView, query: RouteQuery) -> float:
    return uncached_tokens(worker, query) / worker.prefill_tokens_per_s


def decode_step_s(config: RoutingConfig, num_requests: int, context_tokens: int) -> float:
    """Step time of a batch on a machine of scale 1. Linear in the batch and its context, as decode is."""
    return (
        config.decode_step_s
        + config.decode_step_per_request_s * num_requests
        + config.decode_step_per_context_token_s * context_tokens
    )


def decode_s(config: RoutingConfig, worker: WorkerView, query: RouteQuery) -> float:
    """Expected decode time with this request in the batch."""
    load, credit = worker.load, worker.credit
    step_s = worker.decode_scale * decode_step_s(
        config,
        load.num_running + load.num_waiting + credit.num_requests + 1,
        load.context_tokens + credit.context_tokens + query.num_prompt_tokens,
    )
    steps = min(config.expected_output_tokens, max(1, query.max_total_tokens - query.num_prompt_tokens))
    has_room = blocks_free(worker) >= blocks_needed(worker, query)
    return steps * step_s * (1.0 if has_room else 2.0)  # without room it waits until about such a request has ended


def blocks_free(worker: WorkerView) -> int:
    """Free blocks, less what the credit will take. A worker that reports no pool is taken to have room."""
    if worker.load.total_blocks == 0:
        return 2**31
    return worker.load.free_blocks - num_blocks(worker.credit.context_tokens, max(1, worker.block_size))


def blocks_needed(worker: WorkerView, query: RouteQuery) -> int:
    missing = query.num_prompt_tokens + 1 - query.held_tokens.get(worker.worker_id, 0)
    return num_blocks(max(0, missing), max(1, worker.block_size))


def transfer_s(snapshot: ClusterSnapshot, prefill: WorkerId, decode: WorkerView, query: RouteQuery) -> float:
    s_per_byte = snapshot.link_s_per_byte.get((prefill, decode.worker_id), snapshot.default_link_s_per_byte)
    missing_tokens = query.num_prompt_tokens - query.held_tokens.get(decode.worker_id, 0)
    return max(0, missing_tokens) * decode.kv_bytes_per_token * s_per_byte
