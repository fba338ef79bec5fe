"""Whether a prefill worker takes a request now. Pure: limits and a snapshot of the load go in, an answer comes out.

The answer may not wait for the engine, which is busy with a step: it rests on the worker's own accounts, which count
every accepted request in full from the moment of acceptance.
"""

from dataclasses import dataclass

from core.errors import RejectedError, RejectReason
from core.membership import WorkerState


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """What the worker can hold. `max_queued_tokens` bounds the wait, `max_requests` the memory."""

    max_queued_tokens: int
    max_requests: int
    max_model_len: int
    total_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class PrefillAccounts:
    """What the worker holds. `queued_tokens`: of accepted prompts whose first token has not come."""

    state: WorkerState
    num_requests: int
    queued_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class PrefillDemand:
    """What a request asks for.

    Attributes:
        is_known: its request id or transfer id is in use here.
        max_queued_tokens: it wants to go elsewhere when more tokens than this are queued before it; None: to stay.
    """

    num_prompt_tokens: int
    is_known: bool = False
    max_queued_tokens: int | None = None


def refusal(demand: PrefillDemand, accounts: PrefillAccounts, limits: PrefillLimits) -> RejectedError | None:
    """Return why the request cannot be taken now; None to accept it. Pure.

    A prompt longer than the queue limit is taken by an idle worker: another limit says how long prompts may be.
    """
    prompt = demand.num_prompt_tokens
    if accounts.state is WorkerState.DRAINING or accounts.state is WorkerState.STOPPED:
        return RejectedError(RejectReason.DRAINING, "the worker takes no new requests")
    if accounts.state is not WorkerState.READY:
        return RejectedError(RejectReason.NOT_READY, f"the worker is {accounts.state}")
    if demand.is_known:
        return RejectedError(RejectReason.DUPLICATE, "this request is still held here")
    room = min(limits.max_model_len - 1, limits.total_blocks * limits.block_size)
    if prompt > room:
        return RejectedError(RejectReason.TOO_LONG, f"{prompt} prompt tokens, at most {room} fit")
    if accounts.num_requests >= limits.max_requests:
        detail = f"{accounts.num_requests} requests held"
        return RejectedError(RejectReason.QUEUE_FULL, detail, _wait_s(prompt, accounts))
    if accounts.queued_tokens > 0 and accounts.queued_tokens + prompt > limits.max_queued_tokens:
        detail = f"{accounts.queued_tokens} prompt tokens queued, {limits.max_queued_tokens} allowed"
        return RejectedError(RejectReason.QUEUE_FULL, detail, _wait_s(prompt, accounts))
    if demand.max_queued_tokens is not None and accounts.queued_tokens > demand.max_queued_tokens:
        detail = f"{accounts.queued_tokens} prompt tokens queued, {demand.max_queued_tokens} expected at most"
        return RejectedError(RejectReason.BUSIER, detail)
    return None


def _wait_s(num_tokens: int, accounts: PrefillAccounts) -> float:
    """About how long until as many tokens were computed; 0 when the rate is not known yet."""
    return min(num_tokens, accounts.queued_tokens) / accounts.tokens_per_s if accounts.tokens_per_s > 0 else 0.0
