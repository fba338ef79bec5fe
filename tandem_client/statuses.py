"""Failed calls to the errors that the gateway meant. Pure."""

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from core import errors

# What a status alone would not tell.
_BY_REASON: dict[str | None, type[errors.ServingError]] = {
    "eventsgone": errors.RequestNotFound,
    "requestnotfound": errors.RequestNotFound,
    "storeunavailable": errors.StoreUnavailable,
}


def error_of(failed: grpc.aio.AioRpcError) -> errors.ServingError:
    """Rebuild the gateway's error from a status and its details. The caller raises it `from` the original."""
    text = failed.details() or failed.code().name
    status = rpc_status.from_call(failed)  # type: ignore[arg-type]
    details = _Details(status)
    if kind := _BY_REASON.get(details.reason()):
        return kind(text)
    match failed.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return details.invalid(errors.InvalidRequest, text)
        case grpc.StatusCode.OUT_OF_RANGE:
            return details.invalid(errors.PromptTooLong, text)
        case grpc.StatusCode.NOT_FOUND:
            return errors.ModelNotFound(text)
        case grpc.StatusCode.ALREADY_EXISTS:
            return errors.DuplicateRequest(text)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            reason = details.reject_reason()
            if reason is None:
                return errors.SlowReader(text)
            return errors.RejectedError(reason, text.removeprefix(f"{reason}: "), details.retry_after_s())
        case grpc.StatusCode.UNAVAILABLE:
            if details.reject_reason() is errors.RejectReason.NO_WORKERS:
                return errors.NoWorkers(text.removeprefix(f"{errors.RejectReason.NO_WORKERS}: "))
            return errors.WorkerLost(text)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded(text)
        case grpc.StatusCode.CANCELLED:
            return errors.Aborted(text)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return errors.ConfigError(text)
        case grpc.StatusCode.UNAUTHENTICATED:
            return errors.Unauthenticated(details.access_reason(errors.AccessReason.INVALID_CREDENTIAL), text)
        case grpc.StatusCode.PERMISSION_DENIED:
            return errors.PermissionDenied(details.access_reason(errors.AccessReason.MISSING_ROLE), text)
        case _:
            return errors.ServingError(text)


def is_told(failed: grpc.aio.AioRpcError) -> bool:
    """The gateway itself said so: the connection was not lost."""
    status = rpc_status.from_call(failed)  # type: ignore[arg-type]
    return _Details(status).reason() is not None


class _Details:
    """The rich details of a status, absent ones included."""

    def __init__(self, status: status_pb2.Status | None) -> None:
        self._details = list(status.details) if status is not None else []

    def invalid(self, kind: type[errors.InvalidRequest], otherwise: str) -> errors.InvalidRequest:
        for detail in self._details:
            bad_request = error_details_pb2.BadRequest()
            if detail.Unpack(bad_request) and bad_request.field_violations:
                first, *others = [(one.field, one.description) for one in bad_request.field_violations]
                return kind(*first, others=tuple(others))
        return kind("request", otherwise)

    def reason(self) -> str | None:
        """What the gateway calls it; None: it was not the gateway who spoke."""
        for detail in self._details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == "tandem":
                return str(info.reason).lower()
        return None

    def reject_reason(self) -> errors.RejectReason | None:
        reason = self.reason()
        return errors.RejectReason(reason) if reason in set(errors.RejectReason) else None

    def access_reason(self, otherwise: errors.AccessReason) -> errors.AccessReason:
        reason = self.reason()
        return errors.AccessReason(reason) if reason in set(errors.AccessReason) else otherwise

    def retry_after_s(self) -> float:
        for detail in self._details:
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(retry):
                return float(retry.retry_delay.ToNanoseconds()) / 1e9
        return 0.0
