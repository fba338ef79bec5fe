"""Wire messages of an answer to what the client hands out. Pure."""

from collections.abc import Iterable

from protos import inference_pb2 as pb
from tandem_client.reading import read_fields
from tandem_client.types import (
    Alternative,
    FinishReason,
    Placement,
    PromptToken,
    Provenance,
    Started,
    Summary,
    Timing,
    Token,
    ToolCallPiece,
    Usage,
)

_FINISH = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


def started_of(message: pb.Started) -> Started:
    scores = tuple(
        PromptToken(
            one.token_id, one.logprob if one.HasField("logprob") else None, _alternatives(one.top_logprobs), one.token
        )
        for one in message.prompt_logprobs
    )
    return read_fields(Started, message, prompt_scores=scores, provenance=read_fields(Provenance, message.provenance))


def tokens_of(tokens: Iterable[pb.GeneratedToken]) -> tuple[Token, ...]:
    return tuple(
        Token(
            one.index,
            one.token_id,
            one.logprob if one.HasField("logprob") else None,
            _alternatives(one.top_logprobs),
            one.token,
        )
        for one in tokens
    )


def tool_calls_of(calls: Iterable[pb.ToolCallDelta]) -> tuple[ToolCallPiece, ...]:
    return tuple(ToolCallPiece(one.index, one.id, one.name, one.arguments) for one in calls)


def summary_of(started: Started, finished: pb.Finished) -> Summary:
    kind = finished.WhichOneof("matched_stop")
    return Summary(
        request_id=started.request_id,
        model=started.model,
        seed=started.seed,
        finish_reason=_FINISH[finished.reason],
        matched_stop=getattr(finished, kind) if kind else None,
        usage=read_fields(Usage, finished.usage),
        timing=read_fields(Timing, finished.timing),
        placement=read_fields(Placement, finished.placement),
        choice=finished.choice,
        provenance=started.provenance,
    )


def _alternatives(others: Iterable[pb.Logprob]) -> tuple[Alternative, ...]:
    return tuple(Alternative(one.token_id, one.logprob, one.token) for one in others)
