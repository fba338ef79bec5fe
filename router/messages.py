"""What may happen to a request (events, past tense) and what its machine asks for (effects, imperative)."""

from dataclasses import dataclass

from core.errors import RejectedError, ServingError
from core.ids import WorkerId
from core.request import Finish, TokenOutput
from router.policy import Decision, NoCandidate

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """Admission took the request."""


@dataclass(frozen=True, slots=True)
class Released:
    """Admission says: it is this request's turn."""


@dataclass(frozen=True, slots=True)
class PairChosen:
    """The policy found a prefill and a decode worker."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class PrefillChosen:
    """The policy found a prefill worker; the decode worker has accepted already, or none is needed."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class NothingFits:
    """The policy found nobody to ask now."""

    outcome: NoCandidate


@dataclass(frozen=True, slots=True)
class DecodeAccepted:
    """The decode worker reserved blocks."""

    held_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeRejected:
    error: RejectedError


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    """The prefill worker queued the prompt."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillRejected:
    error: RejectedError


@dataclass(frozen=True, slots=True)
class PrefillProduced:
    """Tokens from the prefill worker, of which the last is not the request's last."""

    tokens: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """Tokens from the prefill worker that end the request."""

    tokens: tuple[TokenOutput, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class PrefillMeasured:
    """The prefill worker's own account of the time to the first token."""

    queue_s: float
    compute_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class KvHandedOver:
    """The prefill worker is done: the decode worker acknowledged the KV."""


@dataclass(frozen=True, slots=True)
class KvLanded:
    """The decode worker has it all and put the request into its batch. `kv_bytes`: before compression."""

    exposed_s: float
    first_decode_s: float
    kv_tokens_held: int
    kv_tokens_sent: int
    kv_bytes: int
    kv_profile: str
    kv_lossless: bool
    kv_wire_bytes: int


@dataclass(frozen=True, slots=True)
class DecodeProduced:
    tokens: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class DecodeFinished:
    tokens: tuple[TokenOutput, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class PrefillLost:
    """The prefill worker died, went silent, or lost the request in a way that another one may not."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class DecodeLost:
    """As `PrefillLost`, for the decode worker."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """It cannot succeed: the deadline passed, a worker says so for good, a peer broke the protocol."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """The client (call, disconnect, slow reading) or the gateway's end."""

    error: ServingError


Event = (
    Queued
    | Released
    | PairChosen
    | PrefillChosen
    | NothingFits
    | DecodeAccepted
    | DecodeRejected
    | PrefillAccepted
    | PrefillRejected
    | PrefillProduced
    | PrefillFinished
    | PrefillMeasured
    | KvHandedOver
    | KvLanded
    | DecodeProduced
    | DecodeFinished
    | PrefillLost
    | DecodeLost
    | RequestFailed
    | AbortRequested
)

WorkEvents = list[tuple[str, Event]]
"""What one worker told at once: pairs of work id and event, in order."""

# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChoosePair:
    """Ask the policy; answer with `PairChosen`, `PrefillChosen` (no decode worker is needed) or `NothingFits`."""

    refused: frozenset[WorkerId]


@dataclass(frozen=True, slots=True)
class ChoosePrefill:
    """Ask the policy for another prefill worker, `decode` being fixed; answer with `PrefillChosen` or `NothingFits`."""

    refused: frozenset[WorkerId]
    decode: WorkerId | None


@dataclass(frozen=True, slots=True)
class SubmitDecode:
    """Ask the decode worker to reserve; count the work as the prefill worker's already."""

    worker_id: WorkerId
    prefill: WorkerId
    attempt: int


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """`decode` is None when there is no hand-off."""

    worker_id: WorkerId
    decode: WorkerId | None
    attempt: int


@dataclass(frozen=True, slots=True)
class AbortWork:
    """Free what the worker holds of the request."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseWorker:
    """The worker holds nothing of the request any more (no message needed)."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class ReturnToQueue:
    """Wait for another turn, in the old place of the queue. `retry_after_s` is the hint of whoever refused."""

    cause: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class LeaveQueue:
    """Both workers accepted: the request no longer counts as queued."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give tokens to the client."""

    tokens: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class Conclude:
    """The request is over: well with `finish`, badly with `error`. Exactly one per request, and the last effect."""

    finish: Finish | None = None
    error: ServingError | None = None


Effect = (
    ChoosePair
    | ChoosePrefill
    | SubmitDecode
    | SubmitPrefill
    | AbortWork
    | ReleaseWorker
    | ReturnToQueue
    | LeaveQueue
    | Deliver
    | Conclude
)
