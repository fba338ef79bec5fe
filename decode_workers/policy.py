"""Whether a decode worker takes a request now. Pure: limits and a snapshot of the load go in, an answer comes out.

The engine's reservation has the last word on blocks, because only the engine knows which of them the prompt shares with
its prefix cache; it is asked only for what may succeed.
"""

from dataclasses import dataclass

from core.blocks import num_blocks
from core.errors import RejectedError, RejectReason
from core.membership import WorkerState


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What the worker can hold."""

    max_requests: int
    max_model_len: int
    total_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class DecodeAccounts:
    """What the worker holds.

    Attributes:
        free_blocks: that a new request could take, evictable cache included.
        queued_tokens: of prompts that wait to be computed here.
    """

    state: WorkerState
    num_requests: int
    free_blocks: int
    queued_tokens: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Terms:
    """What the gateway thought of this worker when it chose: with more than this here, it wants to choose again.

    Attributes:
        max_queued_tokens: of prompts that wait to be computed here.
        max_requests_held: whatever they wait for. None: no such bound.
    """

    max_queued_tokens: int | None = None
    max_requests_held: int | None = None


NO_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class DecodeDemand:
    """What a request asks for. `is_known`: its request id or transfer id is in use here."""

    num_prompt_tokens: int
    is_known: bool = False
    terms: Terms = NO_TERMS


def refusal(demand: DecodeDemand, accounts: DecodeAccounts, limits: DecodeLimits) -> RejectedError | None:
    """Return why the request cannot be taken now; None to try a reservation. Pure."""
    prompt = demand.num_prompt_tokens
    if accounts.state is WorkerState.DRAINING or accounts.state is WorkerState.STOPPED:
        return RejectedError(RejectReason.DRAINING, "the worker takes no new requests")
    if accounts.state is not WorkerState.READY:
        return RejectedError(RejectReason.NOT_READY, f"the worker is {accounts.state}")
    if demand.is_known:
        return RejectedError(RejectReason.DUPLICATE, "this request is still held here")
    needed = num_blocks(prompt + 1, limits.block_size)
    if prompt >= limits.max_model_len or needed > limits.total_blocks:
        room = min(limits.max_model_len, limits.total_blocks * limits.block_size) - 1
        return RejectedError(RejectReason.TOO_LONG, f"{prompt} prompt tokens, at most {room} fit")
    if accounts.num_requests >= limits.max_requests:
        return RejectedError(RejectReason.QUEUE_FULL, f"{accounts.num_requests} requests held", accounts.step_s)
    if accounts.num_requests > 0 and accounts.free_blocks == 0:
        return RejectedError(RejectReason.NO_BLOCKS, "every block is in use", accounts.step_s)
    terms = demand.terms
    if terms.max_queued_tokens is not None and accounts.queued_tokens > terms.max_queued_tokens:
        detail = f"{accounts.queued_tokens} prompt tokens queued, {terms.max_queued_tokens} expected at most"
        return RejectedError(RejectReason.BUSIER, detail)
    if terms.max_requests_held is not None and accounts.num_requests > terms.max_requests_held:
        detail = f"{accounts.num_requests} requests held, {terms.max_requests_held} expected at most"
        return RejectedError(RejectReason.BUSIER, detail)
    return None
