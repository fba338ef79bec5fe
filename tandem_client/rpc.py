"""Wire messages and statuses to what the client hands out. Pure."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import grpc
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from core import errors
from core.request import FinishReason
from protos import admin_pb2
from protos import inference_pb2 as pb
from tandem_client.sampling import Sampling
from tandem_client.types import (
    Alternative,
    ClusterStatus,
    KvDecision,
    Message,
    ModelInfo,
    Placement,
    RouteCandidate,
    RouteDecision,
    RouteOutcome,
    Service,
    Summary,
    Timing,
    Token,
    Usage,
    WorkerStatus,
)

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat."""

T = TypeVar("T")
_LEVELS = {
    "exact": pb.KV_QUALITY_LEVEL_EXACT,
    "high": pb.KV_QUALITY_LEVEL_HIGH,
    "balanced": pb.KV_QUALITY_LEVEL_BALANCED,
}
_CLASSES = {
    "": pb.SERVICE_CLASS_UNSPECIFIED,
    "interactive": pb.SERVICE_CLASS_INTERACTIVE,
    "deadline": pb.SERVICE_CLASS_DEADLINE,
    "batch": pb.SERVICE_CLASS_BATCH,
}
_FINISH = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}


def generate_request(
    prompt: Prompt,
    model: str,
    request_id: str,
    sampling: Sampling,
    *,
    kv_quality: str | float | None = None,
    handoff_budget_s: float | None = None,
    tenant: str = "",
    service: Service,
) -> pb.GenerateRequest:
    """Raises: InvalidRequest, for values that the wire has no room for."""
    try:
        request = pb.GenerateRequest(
            model=model,
            request_id=request_id,
            sampling=pb.SamplingParams(**sampling),
            terms=pb.RequestTerms(
                kv_quality=_quality(kv_quality),
                handoff_budget_s=handoff_budget_s,
                tenant=tenant,
                service_class=_service_class(service.service_class),
                priority=service.priority,
                slo=_slo(service),
                session_id=service.session_id,
            ),
        )
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], tuple):
            request.chat.CopyFrom(chat_messages([one for one in prompt if isinstance(one, tuple)]))
        else:
            request.token_ids.ids.extend(one for one in prompt if isinstance(one, int))
            request.token_ids.SetInParent()
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequest("request", f"cannot be sent: {error}") from error
    return request


def _quality(wanted: str | float | None) -> pb.KvQuality | None:
    if wanted is None:
        return None
    if not isinstance(wanted, str):
        return pb.KvQuality(floor=wanted)
    if wanted not in _LEVELS:
        raise errors.InvalidRequest("kv_quality", f"must be a number or one of {', '.join(_LEVELS)}, got {wanted!r}")
    return pb.KvQuality(level=_LEVELS[wanted])


def _service_class(wanted: str) -> pb.ServiceClass.ValueType:
    if wanted not in _CLASSES:
        raise errors.InvalidRequest(
            "service_class", f"must be one of {', '.join(filter(None, _CLASSES))}, got {wanted!r}"
        )
    return _CLASSES[wanted]


def _slo(service: Service) -> pb.Slo | None:
    targets = {"ttft_s": service.ttft_s, "tpot_s": service.tpot_s, "deadline_s": service.deadline_s}
    return pb.Slo(**targets) if any(target is not None for target in targets.values()) else None


def chat_messages(messages: Sequence[tuple[str, str]]) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])


def tokens_of(delta: pb.TokenDelta) -> tuple[Token, ...]:
    return tuple(
        Token(
            token.index,
            token.token_id,
            token.logprob if token.HasField("logprob") else None,
            tuple(Alternative(other.token_id, other.logprob, other.token) for other in token.top_logprobs),
        )
        for token in delta.tokens
    )


def summary_of(started: pb.Started, finished: pb.Finished) -> Summary:
    kind = finished.WhichOneof("matched_stop")
    return Summary(
        request_id=started.request_id,
        model=started.model,
        seed=started.seed,
        finish_reason=_FINISH[finished.reason],
        matched_stop=getattr(finished, kind) if kind else None,
        usage=_read(Usage, finished.usage),
        timing=_read(Timing, finished.timing),
        placement=_read(Placement, finished.placement),
    )


def model_info_of(reply: pb.GetModelInfoResponse) -> ModelInfo:
    return _read(ModelInfo, reply, eos_token_ids=tuple(reply.eos_token_ids))


def cluster_status_of(reply: admin_pb2.GetClusterStatusResponse) -> ClusterStatus:
    workers = tuple(_read(WorkerStatus, worker) for worker in reply.workers)
    return _read(ClusterStatus, reply, workers=workers)


def kv_decisions_of(reply: admin_pb2.ListClusterKvDecisionsResponse) -> list[KvDecision]:
    return [
        KvDecision(
            prefill_worker=worker.worker_id,
            peer=one.peer,
            transfer_id=one.transfer_id,
            age_s=one.age_s,
            profile=one.profile,
            reason=one.reason,
            quality_floor=one.quality_floor,
            tenant=one.tenant,
            num_tokens=one.num_tokens,
            raw_bytes=one.raw_bytes,
            goodput_bytes_per_s=one.goodput_bytes_per_s,
            predicted_s=one.predicted_s if one.HasField("predicted_s") else None,
            observed_s=one.outcome.observed_s if one.HasField("outcome") else None,
            wire_bytes=one.outcome.payload_bytes,
            failure=one.outcome.failure,
            details=json.loads(one.json) if one.json else {},
        )
        for worker in reply.workers
        for one in worker.decisions
    ]


def route_decisions_of(reply: admin_pb2.ExplainRequestResponse) -> list[RouteDecision]:
    return [
        _read(
            RouteDecision,
            one,
            winner=_candidate(one.winner),
            candidates=tuple(_candidate(candidate) for candidate in one.candidates),
            outcome=_read(RouteOutcome, one.outcome) if one.HasField("outcome") else None,
        )
        for one in reply.decisions
    ]


def _candidate(message: admin_pb2.RouteCandidate) -> RouteCandidate:
    return _read(RouteCandidate, message, terms_s=dict(message.terms_s))


def error_of(failed: grpc.aio.AioRpcError) -> errors.ServingError:
    """Rebuild the gateway's error from a status and its details. The caller raises it `from` the original."""
    text = failed.details() or failed.code().name
    status = rpc_status.from_call(failed)  # type: ignore[arg-type]
    details = _Details(status)
    match failed.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return errors.InvalidRequest(*details.violation(text))
        case grpc.StatusCode.OUT_OF_RANGE:
            return errors.PromptTooLong(*details.violation(text))
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
        case _:
            return errors.ServingError(text)


class _Details:
    """The rich details of a status, absent ones included."""

    def __init__(self, status: status_pb2.Status | None) -> None:
        self._details = list(status.details) if status is not None else []

    def violation(self, otherwise: str) -> tuple[str, str]:
        for detail in self._details:
            bad_request = error_details_pb2.BadRequest()
            if detail.Unpack(bad_request) and bad_request.field_violations:
                first = bad_request.field_violations[0]
                return first.field, first.description
        return "request", otherwise

    def reject_reason(self) -> errors.RejectReason | None:
        for detail in self._details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                values = {reason.value for reason in errors.RejectReason}
                return errors.RejectReason(info.reason.lower()) if info.reason.lower() in values else None
        return None

    def retry_after_s(self) -> float:
        for detail in self._details:
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(retry):
                return float(retry.retry_delay.ToNanoseconds()) / 1e9
        return 0.0


def _read(kind: type[T], message: ProtoMessage, **others: object) -> T:
    """Copy the fields that `kind` knows, which have the message's names; a newer gateway may send more."""
    names = [one.name for one in fields(kind) if one.name not in others]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **others)
