"""A thin, typed, asynchronous client of a Tandem gateway over gRPC.

    async with Client("localhost:50051") as client:
        async for piece in client.generate("Once upon a time", max_tokens=32):
            print(piece.text, end="")

Failures are the exceptions of `core.errors` (all are `ServingError`), re-exported here.
"""

from core.errors import (
    Aborted,
    ConfigError,
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    ModelNotFound,
    NoWorkers,
    PromptTooLong,
    RejectedError,
    ServingError,
    SlowReader,
    WorkerLost,
)
from core.request import FinishReason
from tandem_client.client import Client
from tandem_client.sampling import Sampling
from tandem_client.types import (
    Alternative,
    ClusterStatus,
    Generation,
    KvDecision,
    Message,
    ModelInfo,
    Piece,
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

__all__ = [
    "Aborted",
    "Alternative",
    "Client",
    "ClusterStatus",
    "ConfigError",
    "DeadlineExceeded",
    "DuplicateRequest",
    "FinishReason",
    "Generation",
    "InvalidRequest",
    "KvDecision",
    "Message",
    "ModelInfo",
    "ModelNotFound",
    "NoWorkers",
    "Piece",
    "Placement",
    "PromptTooLong",
    "RejectedError",
    "RouteCandidate",
    "RouteDecision",
    "RouteOutcome",
    "Sampling",
    "Service",
    "ServingError",
    "SlowReader",
    "Summary",
    "Timing",
    "Token",
    "Usage",
    "WorkerLost",
    "WorkerStatus",
]
