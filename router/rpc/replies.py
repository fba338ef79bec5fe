"""What gRPC clients are sent: the beginning, text and tokens with log-probabilities, the closing account. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.request import PromptToken, SamplingParams, TokenLogprob, TokenOutput
from protos import inference_pb2 as pb
from protos.codec import finish_reason_to_wire
from router.chat.events import ChatDelta, ContentDelta, ToolCallDelta
from router.generation.answer import Answer, ChoicePiece
from router.generation.chat_answer import ChatAnswer, ChatPiece
from router.stream import Completion
from router.tokenizer import GatewayTokenizer

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer


class GenerateEvents:
    """The events of one Generate call, numbered over all its choices."""

    def __init__(self, answer: Answer, tokenizer: GatewayTokenizer) -> None:
        self._answer = answer
        self._words = TokenWords(tokenizer, answer.requests[0].sampling)
        self._next_index = 0

    def started(self) -> pb.GenerateResponse:
        """The first event; to be made once the answer gave its first pieces."""
        return self._numbered(pb.GenerateResponse(started=started(self._answer, self._words)))

    def of(self, pieces: Sequence[ChoicePiece]) -> list[pb.GenerateResponse]:
        """Return what tells of these pieces."""
        events = []
        for piece in pieces:
            if piece.tokens or piece.text:
                event = pb.GenerateResponse()
                delta = event.delta  # filled in place: a message put into another is copied
                delta.text, delta.choice = piece.text, piece.choice
                self._words.add_tokens(delta.tokens, piece.tokens)
                events.append(self._numbered(event))
            if piece.completion is not None:
                end = finished(piece.completion, piece.choice)
                events.append(self._numbered(pb.GenerateResponse(finished=end)))
        return events

    def _numbered(self, event: pb.GenerateResponse) -> pb.GenerateResponse:
        event.event_index = self._next_index
        self._next_index += 1
        return event


class ChatEvents:
    """The events of one Chat call, numbered over all its choices."""

    def __init__(self, chat: ChatAnswer, tokenizer: GatewayTokenizer) -> None:
        self._answer = chat.answer
        self._words = TokenWords(tokenizer, chat.answer.requests[0].sampling)
        self._next_index = 0

    def started(self) -> pb.ChatResponse:
        """As `GenerateEvents.started`."""
        return self._numbered(pb.ChatResponse(started=started(self._answer, self._words)))

    def of(self, pieces: Sequence[ChatPiece]) -> list[pb.ChatResponse]:
        """Return what tells of these pieces."""
        events = []
        for piece in pieces:
            if piece.tokens or piece.deltas:
                event = pb.ChatResponse()
                delta = event.delta
                delta.choice = piece.choice
                for part in piece.deltas:
                    _add_delta(delta, part)
                self._words.add_tokens(delta.tokens, piece.tokens)
                events.append(self._numbered(event))
            if piece.completion is not None:
                end = finished(piece.completion, piece.choice)
                if piece.finish_reason == "tool_calls":
                    end.reason = pb.FINISH_REASON_TOOL_CALLS
                events.append(self._numbered(pb.ChatResponse(finished=end)))
        return events

    def _numbered(self, event: pb.ChatResponse) -> pb.ChatResponse:
        event.event_index = self._next_index
        self._next_index += 1
        return event


def _add_delta(message: pb.ChatDelta, delta: ChatDelta) -> None:
    match delta:
        case ContentDelta(text):
            message.content += text
        case ToolCallDelta(index, call_id, name, arguments):
            message.tool_calls.add(index=index, id=call_id, name=name, arguments=arguments)


class TokenWords:
    """Tokens on the wire, with their texts where log-probabilities were asked for."""

    def __init__(self, tokenizer: GatewayTokenizer, sampling: SamplingParams) -> None:
        self._text = tokenizer.token_text
        self._has_logprobs = sampling.logprobs is not None

    def add_tokens(
        self, wire: "RepeatedCompositeFieldContainer[pb.GeneratedToken]", tokens: Sequence[TokenOutput]
    ) -> None:
        if not self._has_logprobs:
            for one in tokens:
                wire.add(index=one.index, token_id=one.token_id)
            return
        for one in tokens:
            wire.add(
                index=one.index,
                token_id=one.token_id,
                logprob=one.logprob,
                top_logprobs=self._alternatives(one.top_logprobs),
                token=self._text(one.token_id),
            )

    def prompt(self, tokens: Sequence[PromptToken]) -> list[pb.PromptToken]:
        return [
            pb.PromptToken(
                token_id=one.token_id,
                logprob=one.logprob,
                top_logprobs=self._alternatives(one.top_logprobs),
                token=self._text(one.token_id),
            )
            for one in tokens
        ]

    def _alternatives(self, others: Sequence[TokenLogprob]) -> list[pb.Logprob]:
        return [
            pb.Logprob(token_id=one.token_id, logprob=one.logprob, token=self._text(one.token_id)) for one in others
        ]


def started(answer: Answer, words: TokenWords) -> pb.Started:
    """How the answer to one prompt begins."""
    request, provenance = answer.requests[0], answer.provenance
    return pb.Started(
        request_id=request.request_id,
        model=answer.model,
        seed=request.sampling.seed,
        prompt_tokens=request.num_prompt_tokens,
        prompt_logprobs=[token for scored in answer.prompt_tokens for token in words.prompt(scored)],
        provenance=pb.Provenance(
            weights_version=provenance.weights_version,
            dtype=provenance.dtype,
            engine_version=provenance.engine_version,
        ),
    )


def finished(completion: Completion, choice: int) -> pb.Finished:
    message = pb.Finished(
        reason=finish_reason_to_wire(completion.finish.reason),
        usage=pb.Usage(
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            cached_tokens=completion.cached_tokens,
        ),
        timing=_timing(completion),
        placement=_placement(completion),
        choice=choice,
    )
    matched = completion.finish.matched_stop
    if isinstance(matched, str):
        message.stop_string = matched
    elif matched is not None:
        message.stop_token_id = matched
    return message


def _timing(completion: Completion) -> pb.Timing:
    split, landed = completion.timing, completion.landed
    return pb.Timing(
        queue_s=split.queue_s,
        route_s=split.route_s,
        prefill_s=split.prefill_s,
        transfer_s=landed.exposed_s if landed else 0.0,
        first_decode_s=landed.first_decode_s if landed else 0.0,
        ttft_s=split.ttft_s,
        tpot_s=split.tpot_s,
        total_s=split.total_s,
    )


def _placement(completion: Completion) -> pb.Placement:
    landed, placement = completion.landed, completion.placement
    return pb.Placement(
        prefill_worker=placement.prefill_worker or "",
        decode_worker=placement.decode_worker or "",
        reason=placement.reason,
        attempts=completion.num_asked,
        kv_bytes=landed.kv_bytes if landed else 0,
        kv_tokens_sent=landed.kv_tokens_sent if landed else 0,
        kv_tokens_held=landed.kv_tokens_held if landed else 0,
        kv_profile=landed.kv_profile if landed else "",
        kv_lossless=landed.kv_lossless if landed else True,
        kv_wire_bytes=landed.kv_wire_bytes if landed else 0,
        mode=placement.mode,
        mode_reason=placement.mode_reason,
        binding=placement.binding or "",
        predicted_ttft_s=placement.predicted_ttft_s,
        predicted_tpot_s=placement.predicted_tpot_s,
        staleness_s=placement.staleness_s,
    )
