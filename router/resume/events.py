"""What a log holds, and what may go wrong with one. Pure."""

from enum import StrEnum
from typing import NamedTuple

from core.errors import ServingError


class StreamKind(StrEnum):
    """In whose words a stream's events are: who began it, so who may read it on."""

    GENERATE = "generate"  # tandem.v1.GenerateResponse
    CHAT = "chat"  # tandem.v1.ChatResponse
    SSE = "sse"  # an event of text/event-stream


class LoggedEvent(NamedTuple):
    """`number`: 0, 1, 2, ... over the whole stream."""

    number: int
    data: bytes


class StreamKey(NamedTuple):
    """A stream's name: each tenant has names of its own, so nobody can find out about another's."""

    tenant: str
    request_id: str


class RelayedError(ServingError):
    """How a request of another gateway failed, as that gateway told it."""

    def __init__(self, message: str, *, reason: str, grpc_code: str, http_status: int, retryable: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.grpc_code = grpc_code
        self.http_status = http_status
        self.retryable = retryable


class GatewayGone(ServingError):
    """The gateway that served the request is gone, and the request with it; what it had saved was delivered."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class EventsGone(ServingError):
    """Events that the reader has not seen are kept no longer, or are not here: the stream cannot be continued."""

    grpc_code = "OUT_OF_RANGE"
    http_status = 410
