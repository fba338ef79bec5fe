"""Workers' reports to events of the request machine. Pure.

A failure that another worker may not have becomes "lost" (tried elsewhere before the first token); one that any worker
would have, or that must not be tried twice, ends the request.
"""

from core.errors import (
    TRANSFER_CANCELLED,
    DeadlineExceeded,
    InvalidRequest,
    PromptTooLong,
    ProtocolError,
    ServingError,
    WorkerLost,
)
from core.membership import LoadReport
from protos import worker_pb2
from protos.codec import load_from_wire, outputs_from_wire, rejection_from_wire
from router import messages as m
from router.messages import WorkEvents

_TRANSIENT_CODES = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"})


def read_prefill_report(report: worker_pb2.PrefillReport) -> WorkEvents | LoadReport:
    """Translate one report.

    Raises:
        ProtocolError: unknown, or out of place.
    """
    match report.WhichOneof("report"):
        case "accepted":
            return [
                (report.accepted.request_id, m.PrefillAccepted(report.accepted.cached_tokens, _load(report.accepted)))
            ]
        case "rejected":
            return [
                (
                    report.rejected.request_id,
                    m.PrefillRejected(rejection_from_wire(report.rejected), _load(report.rejected)),
                )
            ]
        case "outputs":
            return [
                (
                    output.request_id,
                    m.PrefillFinished(output.tokens, output.finish, output.prompt_tokens)
                    if output.finish
                    else m.PrefillProduced(output.tokens, output.prompt_tokens),
                )
                for output in outputs_from_wire(report.outputs)
            ]
        case "computed":
            return [_measured(report.computed)]
        case "handed_over":
            return [(report.handed_over.request_id, _handed_over(report.handed_over))]
        case "failed":
            error, is_transient = read_failure(report.failed)
            return [(report.failed.request_id, m.PrefillLost(error) if is_transient else m.RequestFailed(error))]
        case "load":
            return load_from_wire(report.load)
        case other:
            raise ProtocolError(f"a prefill worker sent {other or 'an empty report'}")


def read_decode_report(report: worker_pb2.DecodeReport) -> WorkEvents | LoadReport:
    """Translate one report.

    Raises:
        ProtocolError: unknown, or out of place.
    """
    match report.WhichOneof("report"):
        case "accepted":
            return [
                (report.accepted.request_id, m.DecodeAccepted(report.accepted.cached_tokens, _load(report.accepted)))
            ]
        case "rejected":
            return [
                (
                    report.rejected.request_id,
                    m.DecodeRejected(rejection_from_wire(report.rejected), _load(report.rejected)),
                )
            ]
        case "outputs":
            return [
                (
                    output.request_id,
                    m.DecodeFinished(output.tokens, output.finish, output.prompt_tokens)
                    if output.finish
                    else m.DecodeProduced(output.tokens, output.prompt_tokens),
                )
                for output in outputs_from_wire(report.outputs)
            ]
        case "landed":
            landed = report.landed
            event = m.KvLanded(
                landed.exposed_s,
                landed.first_decode_s,
                landed.kv_tokens_held,
                landed.kv_tokens_sent,
                landed.kv_bytes,
                landed.kv_profile,
                landed.kv_lossless,
                landed.kv_wire_bytes,
            )
            return [(landed.request_id, event)]
        case "computed":
            return [_measured(report.computed)]
        case "failed":
            error, is_transient = read_failure(report.failed)
            if report.failed.reason == TRANSFER_CANCELLED:
                return [(report.failed.request_id, m.TransferCancelled(error))]
            return [(report.failed.request_id, m.DecodeLost(error) if is_transient else m.RequestFailed(error))]
        case "load":
            return load_from_wire(report.load)
        case other:
            raise ProtocolError(f"a decode worker sent {other or 'an empty report'}")


def _load(answer: worker_pb2.Accepted | worker_pb2.Rejected) -> LoadReport | None:
    return load_from_wire(answer.load) if answer.HasField("load") else None


def _measured(computed: worker_pb2.PrefillComputed) -> tuple[str, m.Event]:
    return computed.request_id, m.PrefillMeasured(computed.queue_s, computed.compute_s, computed.cached_tokens)


def _handed_over(handed_over: worker_pb2.HandedOver) -> m.KvHandedOver:
    has_goodput = handed_over.HasField("link_goodput_bytes_per_s")
    return m.KvHandedOver(
        handed_over.link_goodput_bytes_per_s if has_goodput else None,
        handed_over.link_rtt_s if handed_over.HasField("link_rtt_s") else None,
        handed_over.link_queued_bytes,
    )


def read_failure(failed: worker_pb2.WorkFailed) -> tuple[ServingError, bool]:
    """Return the error, and whether another worker may succeed."""
    text = f"{failed.reason}: {failed.detail}" if failed.detail else failed.reason
    if failed.grpc_code in _TRANSIENT_CODES:
        return WorkerLost(text), True
    match failed.grpc_code:
        case "OUT_OF_RANGE":
            return PromptTooLong("prompt", text), False
        case "INVALID_ARGUMENT":
            field, colon, problem = failed.detail.partition(": ")
            if failed.reason == InvalidRequest.__name__ and colon:
                return InvalidRequest(field, problem), False
            return InvalidRequest("request", text), False
        case "DEADLINE_EXCEEDED":
            return DeadlineExceeded(text), False
        case _:
            return ServingError(text), False
