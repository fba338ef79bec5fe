"""Entries of a stream's mirror in the shared store to bytes and back. Pure."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from core.errors import ProtocolError, ServingError
from core.ids import GatewayId
from protos import replica_pb2 as pb
from router.resume.events import RelayedError, StreamKey, StreamKind


@dataclass(frozen=True, slots=True)
class StreamOrigin:
    """Which stream it is. `nonce`: tells one admission of a request id from another."""

    gateway_id: GatewayId
    nonce: str
    kind: StreamKind
    window_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """One entry.

    Attributes:
        first_number: of the first event, or of the one that comes next.
        is_over: nothing follows; `error`: how it failed.
        is_cut: something follows, but not here.
        is_first: the mirror begins with this entry.
    """

    origin: StreamOrigin
    first_number: int
    events: tuple[bytes, ...] = ()
    is_over: bool = False
    error: ServingError | None = None
    is_cut: bool = False
    is_first: bool = False


def mirror_key(cluster: str, key: StreamKey) -> str:
    """Name of a stream's mirror."""
    return f"tandem:{cluster}:resume:{key.tenant}/{key.request_id}"


def reader_key(mirror: str) -> str:
    """Name of the lease that says: somebody reads this mirror."""
    return f"{mirror}/reader"


def batch_to_bytes(batch: Batch) -> bytes:
    """Encode."""
    origin = batch.origin
    wire = pb.ResumeBatch(
        gateway_id=origin.gateway_id,
        nonce=origin.nonce,
        kind=origin.kind,
        window_s=origin.window_s,
        first_index=batch.first_number,
        events=batch.events,
        is_cut=batch.is_cut,
        is_first=batch.is_first,
    )
    if batch.is_over:
        wire.outcome.CopyFrom(_outcome(batch.error))
    return wire.SerializeToString()


def batch_from_bytes(data: bytes) -> Batch:
    """Decode.

    Raises:
        ProtocolError: these bytes are no batch.
    """
    try:
        wire = pb.ResumeBatch.FromString(data)
        kind = StreamKind(wire.kind)
    except (DecodeError, ValueError) as error:
        raise ProtocolError(f"no batch of a stream: {error}") from error
    return Batch(
        StreamOrigin(GatewayId(wire.gateway_id), wire.nonce, kind, wire.window_s),
        wire.first_index,
        tuple(wire.events),
        is_over=wire.HasField("outcome"),
        error=_error(wire.outcome) if wire.outcome.grpc_code else None,
        is_cut=wire.is_cut,
        is_first=wire.is_first,
    )


def _outcome(error: ServingError | None) -> pb.ResumeOutcome:
    if error is None:
        return pb.ResumeOutcome()
    reason = getattr(error, "reason", None)
    return pb.ResumeOutcome(
        grpc_code=error.grpc_code,
        http_status=error.http_status,
        retryable=error.retryable,
        reason=str(reason or type(error).__name__),
        message=str(error),
    )


def _error(outcome: pb.ResumeOutcome) -> ServingError:
    return RelayedError(
        outcome.message,
        reason=outcome.reason,
        grpc_code=outcome.grpc_code,
        http_status=outcome.http_status,
        retryable=outcome.retryable,
    )
