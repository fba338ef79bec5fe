"""Every failure that a caller can meet, with what it means on each surface.

A class fixes its gRPC status name, its HTTP status and whether trying again (elsewhere, later) can help.
Foreign exceptions are translated at the edge that meets them (`raise ... from`); nothing above an edge sees a
socket, Redis, Ray or torch.distributed error.
"""

from enum import StrEnum


class ServingError(Exception):
    """Base of all. `str(error)` is one line, fit to be shown to a user."""

    grpc_code: str = "INTERNAL"
    http_status: int = 500
    retryable: bool = False


class ConfigError(ServingError):
    """The configuration or the environment cannot work; nothing was started. The message names the key."""

    grpc_code = "FAILED_PRECONDITION"


class InvalidRequest(ServingError):
    """The request can never succeed as it is.

    Attributes:
        field: dotted path of the offending field, of the first when there are several.
        violations: each field and what is wrong with it.
    """

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, problem: str, *, others: tuple[tuple[str, str], ...] = ()) -> None:
        self.field = field
        self.problem = problem
        self.violations = ((field, problem), *others)
        super().__init__("; ".join(f"{name}: {what}" for name, what in self.violations))


class PromptTooLong(InvalidRequest):
    """Prompt plus `max_tokens` exceeds what the model or the pools can hold."""

    grpc_code = "OUT_OF_RANGE"


class AccessReason(StrEnum):
    """Why a caller is not let in, or may not do what it asks."""

    MISSING_CREDENTIAL = "missing_credential"
    MALFORMED_CREDENTIAL = "malformed_credential"
    INVALID_CREDENTIAL = "invalid_credential"  # not known here, or its signature or its claims do not hold
    KEY_EXPIRED = "key_expired"
    KEY_REVOKED = "key_revoked"
    TOKEN_EXPIRED = "token_expired"
    MISSING_ROLE = "missing_role"
    OTHER_TENANT = "other_tenant"


class Unauthenticated(ServingError):
    """Nobody knows who is calling. The message never repeats what was presented."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401

    def __init__(self, reason: AccessReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class PermissionDenied(ServingError):
    """The caller is known, and may not do this. `who`: the caller's name, for the record."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403

    def __init__(self, reason: AccessReason, detail: str, who: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.who = who


class AccessUnavailable(ServingError):
    """Whether the caller may come in cannot be told now: the keys of the token's issuer are not known."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


class ModelNotFound(ServingError):
    """The request names a model that this cluster does not serve."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class RequestNotFound(ServingError):
    """No request of this id can be read on here: it never was, ended too long ago, or is another tenant's."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class DuplicateRequest(ServingError):
    """A request with this id is already in flight."""

    grpc_code = "ALREADY_EXISTS"
    http_status = 409


class RejectReason(StrEnum):
    """Why a worker or the gateway refuses work now."""

    QUEUE_FULL = "queue_full"
    NO_BLOCKS = "no_blocks"
    DRAINING = "draining"
    STALE_EPOCH = "stale_epoch"
    NOT_READY = "not_ready"
    DUPLICATE = "duplicate"
    INCOMPATIBLE_LAYOUT = "incompatible_layout"
    TOO_LONG = "too_long"
    NO_WORKERS = "no_workers"
    BUSIER = "busier"  # a worker: more is queued here than the gateway thought when it chose
    SLO_TTFT = "slo_ttft"  # the first token would come too late
    SLO_TPOT = "slo_tpot"  # the tokens would come too slowly
    DEADLINE = "deadline"  # the whole answer would come too late
    RATE_LIMITED = "rate_limited"  # of the tenant: requests or tokens per minute
    CONCURRENCY = "concurrency"  # of the tenant: requests at once
    SHED = "shed"  # made room for what cannot wait


class RejectedError(ServingError):
    """Refused now; nothing was kept. Another worker, or a later attempt, may accept."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    retryable = True

    def __init__(self, reason: RejectReason, detail: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


class NoWorkers(RejectedError):
    """No live worker of a role that the request needs."""

    grpc_code = "UNAVAILABLE"
    http_status = 503

    def __init__(self, detail: str) -> None:
        super().__init__(RejectReason.NO_WORKERS, detail)


TRANSFER_CANCELLED = "cancelled"  # reason of a TransferError: an owner ended it, and says itself why


class TransferError(ServingError):
    """A KV transfer ended without an ACK. `reason` is a `NackReason` value or the link's own word."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    retryable = True

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"KV transfer failed: {reason}: {detail}" if detail else f"KV transfer failed: {reason}")
        self.reason = reason


class WorkerLost(ServingError):
    """A worker that held the request died, was fenced, or cut its stream."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


class DeadlineExceeded(ServingError):
    """The caller's deadline passed."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class Aborted(ServingError):
    """The request was aborted by its owner (Abort call, disconnect) before it finished."""

    grpc_code = "CANCELLED"
    http_status = 499


class SlowReader(ServingError):
    """The client did not read its stream, and what was kept for it reached the bound; the request was aborted."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429


class ProtocolError(ServingError):
    """A peer broke the wire contract; what it sent was refused and nothing of it was kept."""

    grpc_code = "INTERNAL"
    http_status = 502


class StoreUnavailable(ServingError):
    """The shared store (Redis) cannot be reached; callers go on with their local mirror."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


class InvalidTransition(ServingError):
    """A state machine was given an event that has no edge in its state; its state is unchanged."""

    def __init__(self, machine: str, state: str, event: object) -> None:
        super().__init__(f"{machine}: no edge from {state} for {type(event).__name__}")
        self.machine = machine
        self.state = state
        self.event = event
