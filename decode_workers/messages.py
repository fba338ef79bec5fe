"""What only a decode worker's request meets: its events, effects and reports, beside those of `workers.messages`."""

from dataclasses import dataclass

from core.errors import ServingError
from core.ids import RequestId, TransferId
from workers.messages import SharedEffect, SharedEvent, SharedReport


@dataclass(frozen=True, slots=True)
class Expected:
    """The transfer that brings the KV of a prompt; it lapses when nothing is heard of it for `lease_s`."""

    transfer_id: TransferId
    lease_s: float


# Events: what happened.


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """The engine has blocks for the prompt; `held_tokens` of it are in its prefix cache."""

    held_tokens: int


@dataclass(frozen=True, slots=True)
class PromptQueued:
    """The engine has taken the prompt to compute it; `cached_tokens` of it are in its prefix cache."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineRefused:
    """The engine kept nothing of the request."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class KvLanded:
    """All KV of the prompt is in our blocks.

    Attributes:
        exposed_s: prefill end to landed.
        kv_bytes: of what was sent, before compression; `kv_wire_bytes` is what crossed.
        is_lossless: what was sent is equal bit for bit.
        dropped_tokens: prompt tokens that the profile left out.
    """

    first_token_id: int
    exposed_s: float
    kv_bytes: int
    kv_wire_bytes: int
    kv_profile: str
    is_lossless: bool
    dropped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TransferCancelled:
    """The prefill worker called the transfer off: the first token was the last, or it gave the request up.

    Nothing of it writes our blocks any more, and nothing failed here.
    """

    reason: str
    detail: str


OwnEvent = BlocksReserved | PromptQueued | EngineRefused | KvLanded | TransferCancelled
Event = OwnEvent | SharedEvent

# Effects: what the shell is to do. `cause` names the event that led to it.


@dataclass(frozen=True, slots=True)
class ExpectTransfer:
    """KV of this transfer may be written from now on, but for the held prefix."""

    request_id: RequestId
    transfer_id: TransferId
    held_tokens: int
    num_tokens: int
    lease_s: float
    cause: str


@dataclass(frozen=True, slots=True)
class ActivateInEngine:
    """The request joins the decode batch; it goes on after `first_token_id`. Unless its KV is exact, it is private."""

    request_id: RequestId
    first_token_id: int
    is_exact: bool
    num_dropped: int
    cause: str


@dataclass(frozen=True, slots=True)
class SendLanded:
    """To the gateway, before this worker's first token: how the hand-off went."""

    request_id: RequestId
    exposed_s: float
    first_decode_s: float
    kv_tokens_held: int
    kv_tokens_sent: int
    kv_bytes: int
    kv_wire_bytes: int
    kv_profile: str
    is_lossless: bool
    cause: str


OwnEffect = ExpectTransfer | ActivateInEngine | SendLanded
Effect = OwnEffect | SharedEffect
Report = SharedReport | SendLanded
