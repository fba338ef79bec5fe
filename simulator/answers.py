"""What a simulated worker answers: the real workers' own policies over its accounts."""

from dataclasses import dataclass

from core.errors import RejectedError, RejectReason
from core.membership import WorkerRecord, WorkerState
from decode_workers import policy as decode_policy
from prefill_workers import policy as prefill_policy
from router.forwarding.worker_port import DecodeOrder, PrefillOrder
from simulator.engine import Engine
from simulator.kv_pool import KvPool


@dataclass(frozen=True, slots=True)
class WorkerTerms:
    """How a simulated worker answers and reports.

    Attributes:
        max_queued_tokens: prompt tokens accepted and not computed; more is refused.
        report_interval_s: load reports after changes are at least so far apart.
        heartbeat_s: a load report comes at least so often, and at no other time unless `reports_changes`.
        reports_changes: load reports follow changes, and every answer carries the load.
        reports_reserved: load reports tell of requests whose KV has not come yet; otherwise only of what runs.
        honours_bounds: conditional orders are refused when the worker is busier than they say.
    """

    max_queued_tokens: int = 262_144
    max_requests: int = 1024
    report_interval_s: float = 0.05
    heartbeat_s: float = 1.0
    reports_changes: bool = True
    reports_reserved: bool = True
    honours_bounds: bool = True


def prompt_refusal(
    order: PrefillOrder, record: WorkerRecord, terms: WorkerTerms, engine: Engine, pool: KvPool, num_held: int
) -> RejectedError | None:
    """Return why a prefill worker does not take a prompt now, or None."""
    limits = prefill_policy.PrefillLimits(
        terms.max_queued_tokens, terms.max_requests, record.max_model_len, pool.total_blocks, record.block_size
    )
    queued_tokens = engine.queued_tokens
    accounts = prefill_policy.PrefillAccounts(WorkerState.READY, num_held, queued_tokens, engine.prefill_tokens_per_s)
    bound = order.max_queued_tokens if terms.honours_bounds else None
    demand = prefill_policy.PrefillDemand(order.request.num_prompt_tokens, max_queued_tokens=bound)
    return prefill_policy.refusal(demand, accounts, limits)


def decode_refusal(
    order: DecodeOrder, record: WorkerRecord, terms: WorkerTerms, engine: Engine, pool: KvPool, num_held: int
) -> RejectedError | None:
    """Return why a decode worker does not take a request now, or None."""
    limits = decode_policy.DecodeLimits(terms.max_requests, record.max_model_len, pool.total_blocks, record.block_size)
    accounts = decode_policy.DecodeAccounts(
        WorkerState.READY,
        num_held,
        free_blocks=pool.free_blocks,
        queued_tokens=engine.queued_tokens,
        step_s=engine.last_step_s,
    )
    bounds = (order.max_queued_tokens, order.max_requests_held) if terms.honours_bounds else (None, None)
    demand = decode_policy.DecodeDemand(order.request.num_prompt_tokens, terms=decode_policy.Terms(*bounds))
    return decode_policy.refusal(demand, accounts, limits)


def no_blocks(engine: Engine) -> RejectedError:
    """The refusal of a request whose blocks do not fit now."""
    return RejectedError(RejectReason.NO_BLOCKS, "its blocks do not fit now", engine.last_step_s)
