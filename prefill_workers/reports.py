"""What a gateway is told over its stream, beside what the request machine says of one request."""

from dataclasses import dataclass

from core.errors import RejectedError
from core.ids import RequestId
from core.membership import LoadReport
from core.request import RequestOutput
from prefill_workers.state import SendComputed, SendFailed, SendHandedOver


@dataclass(frozen=True, slots=True)
class SendAccepted:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class SendRejected:
    request_id: RequestId
    error: RejectedError


@dataclass(frozen=True, slots=True)
class SendOutputs:
    """All that one engine step produced for this gateway."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class SendLoad:
    load: LoadReport


Report = SendAccepted | SendRejected | SendOutputs | SendLoad | SendComputed | SendHandedOver | SendFailed
