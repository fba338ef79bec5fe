"""Scored prompts at the gateway: the bound on how much one call may ask for, and how they are told."""

from pathlib import Path

import grpc
import pytest

from core.errors import InvalidRequest
from core.request import SamplingParams
from protos import inference_pb2 as pb
from router.intake import GenerateCall, TextPrompt
from tests.fakes.cluster import fake_cluster
from tests.fakes.reading import Reading


def asked(text: str, alternatives: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(max_tokens=2, prompt_logprobs=alternatives))


async def test_more_than_one_call_may_ask_for_is_refused_before_any_worker_hears_of_it(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_prompt_logprobs=30) as cluster:
        failure = await Reading(cluster.inference.Generate(asked("a" * 11, 2))).fails(grpc.StatusCode.INVALID_ARGUMENT)
        assert "sampling.prompt_logprobs" in str(failure.details())
        assert "11 prompt tokens with 2 alternatives" in str(failure.details())
        assert not cluster.prefills[0].submits
        assert cluster.holds_nothing()


async def test_the_bound_is_over_all_prompts_of_a_call(checkpoint: Path) -> None:
    def call(text: str) -> GenerateCall:
        sampling = SamplingParams(max_tokens=2, prompt_logprobs=1)
        return GenerateCall("", "", TextPrompt(text), sampling, has_max_tokens=True, has_seed=True)

    async with fake_cluster(checkpoint, max_prompt_logprobs=30) as cluster:
        front = cluster.gateway.front
        with pytest.raises(InvalidRequest, match="20 prompt tokens with 1 alternatives each"):
            await front.answer([call("a" * 8), call("b" * 12)], None)
        answer = await front.answer([call("a" * 8), call("b" * 7)], None)
        answer.abandon("it was taken")
        await cluster.wait_idle()
        assert cluster.holds_nothing()


async def test_scores_come_before_the_first_piece_with_their_texts(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        reading = Reading(cluster.inference.Generate(asked("hello", 3)))
        await reading.read_all()
        assert reading.started is not None
        scored = reading.started.prompt_logprobs
        assert "".join(token.token for token in scored) == "hello"
        assert [token.HasField("logprob") for token in scored] == [False, True, True, True, True]
        assert [len(token.top_logprobs) for token in scored] == [0, 3, 3, 3, 3]
        assert len(reading.tokens) == 2
