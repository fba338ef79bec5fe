"""What gRPC clients are sent: the beginning, text and tokens with log-probabilities, the closing account. Pure."""

from collections.abc import Sequence

from core.request import GenerateRequest, TokenOutput
from protos import inference_pb2 as pb
from protos.codec import finish_reason_to_wire, token_to_wire
from router.stream import Completion
from router.tokenizer import GatewayTokenizer


def started(request: GenerateRequest, model: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=request.request_id,
            model=model,
            seed=request.sampling.seed,
            prompt_tokens=request.num_prompt_tokens,
        )
    )


def delta(text: str, tokens: Sequence[TokenOutput], tokenizer: GatewayTokenizer) -> pb.GenerateResponse:
    wire = [token_to_wire(token) for token in tokens]
    for token in wire:
        for other in token.top_logprobs:
            other.token = tokenizer.token_text(other.token_id)
    return pb.GenerateResponse(delta=pb.TokenDelta(text=text, tokens=wire))


def finished(completion: Completion) -> pb.GenerateResponse:
    message = pb.Finished(
        reason=finish_reason_to_wire(completion.finish.reason),
        usage=pb.Usage(
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            cached_tokens=completion.cached_tokens,
        ),
        timing=_timing(completion),
        placement=_placement(completion),
    )
    matched = completion.finish.matched_stop
    if isinstance(matched, str):
        message.stop_string = matched
    elif matched is not None:
        message.stop_token_id = matched
    return pb.GenerateResponse(finished=message)


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
