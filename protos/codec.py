"""Wire messages to core types and back. Pure; the wire's oddities (presence, unsigned, bytes) stop here."""

import json
from collections.abc import Iterable

from core.constraint import Constraint, ConstraintKind
from core.errors import ProtocolError, RejectedError, RejectReason, ServingError
from core.ids import Epoch, RequestId, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent, KvEventBatch, Tier
from core.membership import LoadReport
from core.request import (
    Finish,
    FinishReason,
    GenerateRequest,
    PromptToken,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from protos import inference_pb2, worker_pb2

_FINISH_TO_WIRE = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}
_TIER_TO_WIRE = {Tier.DEVICE: worker_pb2.CACHE_TIER_DEVICE, Tier.HOST: worker_pb2.CACHE_TIER_HOST}
_TIER_FROM_WIRE = {wire: tier for tier, wire in _TIER_TO_WIRE.items()}
_OPTIONAL_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
    "seed",
    "logprobs",
    "prompt_logprobs",
)


def sampling_to_wire(sampling: SamplingParams) -> inference_pb2.SamplingParams:
    """Every field is set, so the reader needs no defaults."""
    return inference_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        constraint=constraint_to_wire(sampling.constraint),
    )


def sampling_from_wire(message: inference_pb2.SamplingParams, **defaults: float) -> SamplingParams:
    """Absent fields take `defaults`, then the defaults of `SamplingParams`. Ranges are not checked here."""
    given = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}  # type: ignore[arg-type]
    return SamplingParams(
        **{**defaults, **given},
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        constraint=constraint_from_wire(message.constraint),
    )


def constraint_to_wire(constraint: Constraint | None) -> inference_pb2.Constraint | None:
    if constraint is None:
        return None
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return inference_pb2.Constraint(json_object=True)
        case ConstraintKind.JSON_SCHEMA:
            return inference_pb2.Constraint(json_schema=constraint.text)
        case ConstraintKind.REGEX:
            return inference_pb2.Constraint(regex=constraint.text)
        case ConstraintKind.CHOICE:
            return inference_pb2.Constraint(choice=inference_pb2.StringList(values=json.loads(constraint.text)))
        case ConstraintKind.GRAMMAR:
            return inference_pb2.Constraint(grammar=constraint.text)
        case ConstraintKind.STRUCTURAL_TAG:
            return inference_pb2.Constraint(structural_tag=constraint.text)


def constraint_from_wire(message: inference_pb2.Constraint) -> Constraint | None:
    """None when nothing is asked for. Whether the text is a good schema or expression is not checked here."""
    match message.WhichOneof("constraint"):
        case None:
            return None
        case "json_object":
            return Constraint(ConstraintKind.JSON_OBJECT) if message.json_object else None
        case "choice":
            values = json.dumps(list(message.choice.values), ensure_ascii=False)
            return Constraint(ConstraintKind.CHOICE, values)
        case kind:
            return Constraint(ConstraintKind(kind), getattr(message, kind))


def prompt_token_to_wire(token: PromptToken) -> inference_pb2.PromptToken:
    return inference_pb2.PromptToken(
        token_id=token.token_id, logprob=token.logprob, top_logprobs=_logprobs_to_wire(token.top_logprobs)
    )


def prompt_token_from_wire(message: inference_pb2.PromptToken) -> PromptToken:
    return PromptToken(
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=_logprobs_from_wire(message.top_logprobs),
    )


def _logprobs_to_wire(alternatives: Iterable[TokenLogprob]) -> list[inference_pb2.Logprob]:
    return [inference_pb2.Logprob(token_id=one.token_id, logprob=one.logprob) for one in alternatives]


def _logprobs_from_wire(messages: Iterable[inference_pb2.Logprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(one.token_id, one.logprob) for one in messages)


def request_to_wire(request: GenerateRequest) -> worker_pb2.WorkRequest:
    return worker_pb2.WorkRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_wire(request.sampling),
        block_hashes=request.block_hashes,
        tenant=request.tenant,
        adapter=request.adapter,
        shared_salt=request.shared_salt,
    )


def request_from_wire(message: worker_pb2.WorkRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(message.request_id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_wire(message.sampling),
        block_hashes=tuple(message.block_hashes),
        tenant=message.tenant,
        adapter=message.adapter,
        shared_salt=message.shared_salt,
    )


def token_to_wire(token: TokenOutput) -> inference_pb2.GeneratedToken:
    return inference_pb2.GeneratedToken(
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=_logprobs_to_wire(token.top_logprobs),
    )


def token_from_wire(message: inference_pb2.GeneratedToken) -> TokenOutput:
    logprob = message.logprob if message.HasField("logprob") else None
    others = _logprobs_from_wire(found) if (found := message.top_logprobs) else ()
    return TokenOutput(message.index, message.token_id, logprob, others)


def finish_reason_to_wire(reason: FinishReason) -> inference_pb2.FinishReason.ValueType:
    return _FINISH_TO_WIRE[reason]


def finish_to_wire(finish: Finish) -> worker_pb2.WorkFinish:
    message = worker_pb2.WorkFinish(reason=_FINISH_TO_WIRE[finish.reason])
    if isinstance(finish.matched_stop, str):
        message.stop_string = finish.matched_stop
    elif finish.matched_stop is not None:
        message.stop_token_id = finish.matched_stop
    return message


def finish_from_wire(message: worker_pb2.WorkFinish) -> Finish:
    """Raises: ProtocolError for an unknown reason."""
    reason = _FINISH_FROM_WIRE.get(message.reason)
    if reason is None:
        raise ProtocolError(f"unknown finish reason {message.reason}")
    kind = message.WhichOneof("matched_stop")
    return Finish(reason, getattr(message, kind) if kind else None)


def outputs_to_wire(outputs: Iterable[RequestOutput]) -> worker_pb2.OutputBatch:
    return worker_pb2.OutputBatch(
        outputs=[
            worker_pb2.WorkOutput(
                request_id=output.request_id,
                tokens=[token_to_wire(token) for token in output.tokens],
                finish=finish_to_wire(output.finish) if output.finish else None,
                prompt_logprobs=[prompt_token_to_wire(token) for token in output.prompt_tokens],
            )
            for output in outputs
        ]
    )


def outputs_from_wire(batch: worker_pb2.OutputBatch) -> list[RequestOutput]:
    return [
        RequestOutput(
            RequestId(output.request_id),
            tuple([token_from_wire(token) for token in output.tokens]),
            finish_from_wire(output.finish) if output.HasField("finish") else None,
            tuple(map(prompt_token_from_wire, scored)) if (scored := output.prompt_logprobs) else (),
        )
        for output in batch.outputs
    ]


def load_to_wire(load: LoadReport) -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(**load.model_dump())


def load_from_wire(message: worker_pb2.WorkerLoad) -> LoadReport:
    return LoadReport(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def rejection_to_wire(request_id: RequestId, error: RejectedError, load: LoadReport) -> worker_pb2.Rejected:
    return worker_pb2.Rejected(
        request_id=request_id,
        reason=error.reason,
        detail=error.detail,
        retry_after_s=error.retry_after_s,
        load=load_to_wire(load),
    )


def rejection_from_wire(message: worker_pb2.Rejected) -> RejectedError:
    """Raises: ProtocolError for an unknown reason."""
    try:
        reason = RejectReason(message.reason)
    except ValueError as error:
        raise ProtocolError(f"unknown reject reason {message.reason!r}") from error
    return RejectedError(reason, message.detail, message.retry_after_s)


def failure_to_wire(request_id: RequestId, error: ServingError) -> worker_pb2.WorkFailed:
    """The reason is the error's own word, or its class's name."""
    return worker_pb2.WorkFailed(
        request_id=request_id,
        grpc_code=error.grpc_code,
        reason=str(getattr(error, "reason", type(error).__name__)),
        detail=str(error),
    )


def kv_events_to_wire(batch: KvEventBatch) -> worker_pb2.KvEventBatch:
    return worker_pb2.KvEventBatch(
        worker_id=batch.worker_id,
        epoch=batch.epoch,
        sequence=batch.sequence,
        events=[_event_to_wire(event) for event in batch.events],
    )


def chain_to_wire(chain: BlocksStored) -> worker_pb2.CachedChain:
    return worker_pb2.CachedChain(parent=chain.parent, hashes=chain.hashes, tier=_TIER_TO_WIRE[chain.tier])


def chain_from_wire(message: worker_pb2.CachedChain) -> BlocksStored:
    """Raises: ProtocolError for an unknown tier."""
    return BlocksStored(message.parent, tuple(message.hashes), _tier_from_wire(message.tier))


def _tier_from_wire(wire: worker_pb2.CacheTier.ValueType) -> Tier:
    tier = _TIER_FROM_WIRE.get(wire)
    if tier is None:
        raise ProtocolError(f"unknown cache tier {wire}")
    return tier


def _event_to_wire(event: KvEvent) -> worker_pb2.KvEvent:
    match event:
        case BlocksStored():
            return worker_pb2.KvEvent(stored=chain_to_wire(event))
        case BlocksRemoved(hashes, tier):
            return worker_pb2.KvEvent(removed=worker_pb2.RemovedBlocks(hashes=hashes, tier=_TIER_TO_WIRE[tier]))
        case CacheCleared():
            return worker_pb2.KvEvent(cleared=worker_pb2.ClearedCache())


def kv_events_from_wire(message: worker_pb2.KvEventBatch) -> KvEventBatch:
    events: list[KvEvent] = []
    for event in message.events:
        match event.WhichOneof("event"):
            case "stored":
                events.append(chain_from_wire(event.stored))
            case "removed":
                events.append(BlocksRemoved(tuple(event.removed.hashes), _tier_from_wire(event.removed.tier)))
            case "cleared":
                events.append(CacheCleared())
            case other:
                raise ProtocolError(f"unknown KV event {other!r}")
    return KvEventBatch(WorkerId(message.worker_id), Epoch(message.epoch), message.sequence, tuple(events))
