"""Every failure as OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`. Pure."""

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from core.errors import InvalidRequest, ModelNotFound, PermissionDenied, PromptTooLong, RejectedError, ServingError

MAX_MESSAGE_CHARACTERS = 1000
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    499: "request_cancelled",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class HttpProblem(ServingError):
    """Something that only HTTP can get wrong: a route, a method, a media type, a size."""

    def __init__(self, status: int, message: str, code: str | None = None, *, allow: str = "") -> None:
        super().__init__(message)
        self.http_status = status
        self.code = code
        self.allow = allow


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A status, its headers and the error object."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def error_reply(error: ServingError) -> ErrorReply:
    """Say a failure in OpenAI's words."""
    headers: dict[str, str] = {}
    if isinstance(error, RejectedError):
        # Whole seconds, as RFC 9110 has it, and never 0: a client that comes back at once is refused again.
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.retry_after_s > 0:
            headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, HttpProblem) and error.allow:
        headers["allow"] = error.allow
    param = error.field if isinstance(error, InvalidRequest) else None
    return ErrorReply(error.http_status, error_object(error.http_status, str(error), param, _code(error)), headers)


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[:MAX_MESSAGE_CHARACTERS] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _code(error: ServingError) -> str | None:
    match error:
        case HttpProblem():
            return error.code
        case PromptTooLong():
            return "context_length_exceeded"
        case ModelNotFound():
            return "model_not_found"
        case RejectedError() | PermissionDenied():
            return str(error.reason)
        case _ if error.http_status == HTTPStatus.UNAUTHORIZED:
            return "invalid_api_key"
        case _:
            return None
