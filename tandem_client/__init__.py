"""A thin, typed, asynchronous client of a Tandem gateway over gRPC.

    async with Client("localhost:50051") as client:
        async for piece in client.generate("Once upon a time", max_tokens=32):
            print(piece.text, end="")

Failures are the exceptions of `core.errors` (all are `ServingError`), re-exported here.
"""

from core.constraint import Constraint
from core.errors import (
    Aborted,
    ConfigError,
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    ModelNotFound,
    NoWorkers,
    PermissionDenied,
    PromptTooLong,
    RejectedError,
    RequestNotFound,
    ServingError,
    SlowReader,
    Unauthenticated,
    WorkerLost,
)
from core.tls import ClientTls
from tandem_client.client import Client
from tandem_client.cluster_types import (
    ClusterStatus,
    KvDecision,
    ModelInfo,
    RouteCandidate,
    RouteDecision,
    RouteOutcome,
    WorkerStatus,
)
from tandem_client.constraints import grammar, json_object, json_schema, one_of, regex, structural_tag
from tandem_client.keys import KnownKey
from tandem_client.options import ChatOptions, Options, Sampling
from tandem_client.types import (
    Alternative,
    ChatPiece,
    FinishReason,
    Generation,
    Message,
    NamedTool,
    Piece,
    Placement,
    PromptToken,
    Provenance,
    Reply,
    Service,
    Started,
    Summary,
    Timing,
    Token,
    Tool,
    ToolCall,
    ToolCallPiece,
    ToolChoice,
    Usage,
)

__all__ = [
    "Aborted",
    "Alternative",
    "ChatOptions",
    "ChatPiece",
    "Client",
    "ClientTls",
    "ClusterStatus",
    "ConfigError",
    "Constraint",
    "DeadlineExceeded",
    "DuplicateRequest",
    "FinishReason",
    "Generation",
    "InvalidRequest",
    "KnownKey",
    "KvDecision",
    "Message",
    "ModelInfo",
    "ModelNotFound",
    "NamedTool",
    "NoWorkers",
    "Options",
    "PermissionDenied",
    "Piece",
    "Placement",
    "PromptToken",
    "PromptTooLong",
    "Provenance",
    "RejectedError",
    "Reply",
    "RequestNotFound",
    "RouteCandidate",
    "RouteDecision",
    "RouteOutcome",
    "Sampling",
    "Service",
    "ServingError",
    "SlowReader",
    "Started",
    "Summary",
    "Timing",
    "Token",
    "Tool",
    "ToolCall",
    "ToolCallPiece",
    "ToolChoice",
    "Unauthenticated",
    "Usage",
    "WorkerLost",
    "WorkerStatus",
    "grammar",
    "json_object",
    "json_schema",
    "one_of",
    "regex",
    "structural_tag",
]
