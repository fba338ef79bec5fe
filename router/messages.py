"""What may happen to a request (events, past tense) and what its machine asks for (effects, imperative)."""

from dataclasses import dataclass

from core.errors import RejectedError, ServingError
from core.ids import WorkerId
from core.membership import LoadReport, Role
from core.request import Finish, PromptToken, TokenOutput

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

    prefill: WorkerId
    decode: WorkerId


@dataclass(frozen=True, slots=True)
class LateChosen:
    """The policy found a prefill worker that should begin now; a decode worker is to be found while it computes."""

    prefill: WorkerId


@dataclass(frozen=True, slots=True)
class PrefillAloneChosen:
    """The policy found a prefill worker that does all of it: decodes, too, or nothing is left to decode."""

    prefill: WorkerId


@dataclass(frozen=True, slots=True)
class DecodeAloneChosen:
    """The policy found a decode worker that does all of it: computes the prompt, too."""

    decode: WorkerId


@dataclass(frozen=True, slots=True)
class PrefillChosen:
    """The policy found a prefill worker for the decode worker that has accepted already."""

    prefill: WorkerId


@dataclass(frozen=True, slots=True)
class DecodeChosen:
    """The policy found a decode worker for the prompt that a prefill worker computes already."""

    decode: WorkerId


@dataclass(frozen=True, slots=True)
class NothingFits:
    """The policy found nobody to ask now."""

    cause: str


@dataclass(frozen=True, slots=True)
class DecodeUnavailable:
    """The policy found no decode worker to ask now; it is to be asked again after `wait_s`."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class SeekDue:
    """It is time, or there is cause, to ask for a decode worker again."""


@dataclass(frozen=True, slots=True)
class HoldExpired:
    """No decode worker was found in good time after the first token."""


@dataclass(frozen=True, slots=True)
class DecodeAccepted:
    """The decode worker reserved blocks, or took the whole request."""

    held_tokens: int
    load: LoadReport | None = None  # with this request


@dataclass(frozen=True, slots=True)
class DecodeRejected:
    error: RejectedError
    load: LoadReport | None = None  # that it was refused for


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    """The prefill worker queued the prompt."""

    cached_tokens: int
    load: LoadReport | None = None  # with this request


@dataclass(frozen=True, slots=True)
class PrefillRejected:
    error: RejectedError
    load: LoadReport | None = None  # that it was refused for


@dataclass(frozen=True, slots=True)
class PrefillProduced:
    """Tokens from a prefill worker, of which the last is not the request's last. `prompt_tokens`: the scored prompt,
    with the first token of a request that asked for it; the same of the three that follow."""

    tokens: tuple[TokenOutput, ...]
    prompt_tokens: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """Tokens from the prefill worker that end the request."""

    tokens: tuple[TokenOutput, ...]
    finish: Finish
    prompt_tokens: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillMeasured:
    """The own account of the time to the first token of the worker that computed the prompt."""

    queue_s: float
    compute_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class KvHandedOver:
    """The prefill worker is done: the decode worker acknowledged the KV. And what it knows of the link between them."""

    link_goodput_bytes_per_s: float | None = None
    link_rtt_s: float | None = None
    link_queued_bytes: int = 0


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
    prompt_tokens: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeFinished:
    tokens: tuple[TokenOutput, ...]
    finish: Finish
    prompt_tokens: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillLost:
    """The prefill worker died, went silent, or lost the request in a way that another one may not."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class DecodeLost:
    """As `PrefillLost`, for the decode worker."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class TransferCancelled:
    """The decode worker let go, because the prefill worker ended the transfer; why, that one tells itself."""

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
    | LateChosen
    | PrefillAloneChosen
    | DecodeAloneChosen
    | PrefillChosen
    | DecodeChosen
    | NothingFits
    | DecodeUnavailable
    | SeekDue
    | HoldExpired
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
    | TransferCancelled
    | RequestFailed
    | AbortRequested
)

EarlyEvent = KvLanded | DecodeProduced | DecodeFinished | TransferCancelled
"""What a decode worker may tell before the first token is here."""

WorkEvents = list[tuple[str, Event]]
"""What one worker told at once: pairs of work id and event, in order."""

# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChooseWorkers:
    """Ask the policy; answer with `PairChosen`, `LateChosen`, one of the two `...AloneChosen`, or `NothingFits`."""

    refused: frozenset[WorkerId]


@dataclass(frozen=True, slots=True)
class ChoosePrefill:
    """Ask the policy for another prefill worker, `decode` being fixed; answer with `PrefillChosen` or `NothingFits`."""

    refused: frozenset[WorkerId]
    decode: WorkerId


@dataclass(frozen=True, slots=True)
class ChooseDecode:
    """Ask the policy for a decode worker, `prefill` being at work; answer with `DecodeChosen` or `DecodeUnavailable`.

    `num_seeks`: how often that was asked in vain before.
    """

    refused: frozenset[WorkerId]
    prefill: WorkerId
    num_seeks: int


@dataclass(frozen=True, slots=True)
class SubmitDecode:
    """Ask the decode worker to reserve. `prefill`: count the work as its load already; None: it is at work."""

    worker_id: WorkerId
    prefill: WorkerId | None
    attempt: int
    is_conditional: bool  # it may say that it is busier than was thought


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """Give the prompt to a prefill worker. `decode` is None when it will be found later."""

    worker_id: WorkerId
    decode: WorkerId | None
    attempt: int
    is_conditional: bool


@dataclass(frozen=True, slots=True)
class SubmitAlone:
    """Give the whole request to one worker of role `role`."""

    worker_id: WorkerId
    role: Role
    attempt: int
    is_conditional: bool


@dataclass(frozen=True, slots=True)
class BindPrefill:
    """Tell the prefill worker which decode worker has accepted; None: it shall generate the rest itself."""

    worker_id: WorkerId
    decode: WorkerId | None


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
class BlameWorker:
    """It did not answer in time."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class ReturnToQueue:
    """Wait for another turn, in the old place of the queue. `retry_after_s` is the hint of whoever refused."""

    cause: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class LeaveQueue:
    """The workers that it needs now accepted: the request no longer counts as queued."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give tokens to the client, and the scored prompt with the first of them."""

    tokens: tuple[TokenOutput, ...]
    prompt_tokens: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Conclude:
    """The request is over: well with `finish`, badly with `error`. Exactly one per request, and the last effect."""

    finish: Finish | None = None
    error: ServingError | None = None


Effect = (
    ChooseWorkers
    | ChoosePrefill
    | ChooseDecode
    | SubmitDecode
    | SubmitPrefill
    | SubmitAlone
    | BindPrefill
    | BlameWorker
    | AbortWork
    | ReleaseWorker
    | ReturnToQueue
    | LeaveQueue
    | Deliver
    | Conclude
)
