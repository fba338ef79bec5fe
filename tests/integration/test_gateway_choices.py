"""n answers to one prompt over gRPC in front of fake workers: requests of their own, and one thing to the client."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from core.errors import InvalidRequest
from core.request import MAX_SEED, SamplingParams
from protos import inference_pb2 as pb
from router.intake import GenerateCall, TextPrompt
from router.stream import RequestStream
from tests.fakes.cluster import FakeCluster, fake_cluster, text_request
from tests.fakes.reading import Reading, refusal_of
from tests.fakes.script import PATIENCE_S, client_id, refusal


def choices_request(n: int, *, seed: int = 0, max_tokens: int = 4, request_id: str = "many") -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed)
    return pb.GenerateRequest(text="hello", n=n, request_id=request_id, sampling=sampling)


async def read_events(
    call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]",
) -> list[pb.GenerateResponse]:
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in call]


def texts_of(events: list[pb.GenerateResponse], n: int) -> list[str]:
    return ["".join(one.delta.text for one in events if one.delta.choice == choice) for choice in range(n)]


def submitted(cluster: FakeCluster) -> dict[str, int]:
    """The seeds that the prefill worker was given, by request."""
    return {
        client_id(submit.request.request_id): submit.request.sampling.seed for submit in cluster.prefills[0].submits
    }


async def test_every_choice_is_told_whole_with_its_own_seed(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        events = await read_events(cluster.inference.Generate(choices_request(3, seed=2)))
        assert submitted(cluster) == {"many": 2, "many.1": 3, "many.2": 4}
        assert cluster.holds_nothing()
    assert [event.event_index for event in events] == list(range(len(events)))
    assert events[0].HasField("started")
    assert (events[0].started.request_id, events[0].started.seed) == ("many", 2)
    assert texts_of(events, 3) == ["cdef", "defg", "efgh"], "the fake model shifts by the seed"
    for choice in range(3):
        indices = [token.index for one in events for token in one.delta.tokens if one.delta.choice == choice]
        assert indices == [0, 1, 2, 3]
    ends = [event.finished for event in events if event.HasField("finished")]
    assert sorted(end.choice for end in ends) == [0, 1, 2]
    assert all(end.usage.completion_tokens == 4 for end in ends)


async def test_the_last_seed_is_followed_by_the_first(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        await read_events(cluster.inference.Generate(choices_request(2, seed=MAX_SEED - 1)))
        assert submitted(cluster) == {"many": MAX_SEED - 1, "many.1": 0}


async def test_a_choice_is_what_a_request_with_its_seed_would_be(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        together = await read_events(cluster.inference.Generate(choices_request(2, seed=7)))
        alone = [await read_events(cluster.inference.Generate(choices_request(1, seed=seed))) for seed in (7, 8)]
    assert texts_of(together, 2) == [texts_of(events, 1)[0] for events in alone]


@pytest.mark.parametrize("n", [129, 2**32 - 1])
async def test_more_choices_than_allowed_are_refused_by_name(checkpoint: Path, n: int) -> None:
    async with fake_cluster(checkpoint) as cluster:
        failure = await Reading(cluster.inference.Generate(choices_request(n))).fails(grpc.StatusCode.INVALID_ARGUMENT)
        assert "n: " in (failure.details() or "")
        assert cluster.prefills[0].submits == []


async def test_an_abort_ends_all_choices_even_when_the_first_is_over(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.decodes[0].script.go.clear()
        reading = Reading(cluster.inference.Generate(choices_request(3)))
        await reading.read_tokens(3)
        found = await cluster.inference.Abort(pb.AbortRequest(request_id="many"))
        assert found.found
        await reading.fails(grpc.StatusCode.CANCELLED)
        await cluster.wait_idle()
        assert cluster.holds_nothing()
        again = await cluster.inference.Abort(pb.AbortRequest(request_id="many"))
        assert not again.found


async def test_another_tenant_finds_nothing_to_abort(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.decodes[0].script.go.clear()
        reading = cluster.generate(text_request(request_id="theirs", tenant="bank"))
        await reading.read_tokens(1)
        assert not (await cluster.inference.Abort(pb.AbortRequest(request_id="theirs"))).found
        assert not (await cluster.inference.Abort(pb.AbortRequest(request_id="theirs", tenant="shop"))).found
        metadata = (("x-tandem-tenant", "bank"),)
        assert (await cluster.inference.Abort(pb.AbortRequest(request_id="theirs"), metadata=metadata)).found
        await reading.fails(grpc.StatusCode.CANCELLED)


async def test_a_client_that_leaves_ends_all_choices(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.decodes[0].script.go.clear()
        reading = Reading(cluster.inference.Generate(choices_request(4)))
        await reading.read_tokens(4)
        reading.cancel()
        await cluster.wait_idle()
        assert cluster.holds_nothing()


async def test_the_deadline_ends_all_choices_on_the_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.decodes[0].script.go.clear()
        reading = Reading(cluster.inference.Generate(choices_request(2), timeout=0.5))
        await reading.fails(grpc.StatusCode.DEADLINE_EXCEEDED)
        for name in ("many", "many.1"):
            await cluster.decodes[0].wait_aborted(name)
        await cluster.wait_idle()
        assert cluster.holds_nothing()


async def test_one_choice_that_fails_fails_the_call_and_frees_the_others(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_decodes=2) as cluster:
        for worker in cluster.decodes:
            worker.script.go.clear()
        reading = Reading(cluster.inference.Generate(choices_request(4)))
        await reading.read_tokens(4)
        await next(worker for worker in cluster.decodes if worker.held).kill()
        failure = await reading.fails(grpc.StatusCode.UNAVAILABLE)
        assert "lost worker" in (failure.details() or "")
        await cluster.wait_idle()
        assert not cluster.prefills[0].held


async def test_a_call_that_does_not_fit_is_refused_whole(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_active_requests=3) as cluster:
        failure = await Reading(cluster.inference.Generate(choices_request(4))).fails(
            grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        assert refusal_of(failure)[0] == "QUEUE_FULL"
        await cluster.wait_idle()
        assert cluster.holds_nothing()
        events = await read_events(cluster.inference.Generate(choices_request(3)))
        assert texts_of(events, 3) == ["abcd", "bcde", "cdef"], "its name and its places are free again"


async def test_a_call_is_one_charge_at_the_quotas(checkpoint: Path) -> None:
    tenants = {"small": {"requests_per_minute": 2, "max_concurrent_requests": 1}}
    async with fake_cluster(checkpoint, tenants=tenants) as cluster:
        for _ in range(2):
            request = choices_request(5)
            request.terms.tenant = "small"
            await read_events(cluster.inference.Generate(request))
            assert cluster.gateway.quotas.num_held("small") == 0
        failure = await Reading(cluster.inference.Generate(request)).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert refusal_of(failure)[0] == "RATE_LIMITED"
        assert refusal_of(failure)[1] > 0


async def test_several_prompts_are_one_answer(checkpoint: Path) -> None:
    def call(text: str, n: int = 2) -> GenerateCall:
        sampling = SamplingParams(max_tokens=2, seed=1)
        return GenerateCall("", "batch", TextPrompt(text), sampling, has_max_tokens=True, has_seed=True, n=n)

    async with fake_cluster(checkpoint) as cluster:
        front = cluster.gateway.front
        answer = await front.answer([call("one"), call("three")], None)
        texts: dict[int, str] = dict.fromkeys(range(4), "")
        async with asyncio.timeout(PATIENCE_S):
            while not answer.is_over:
                for piece in await answer.take():
                    texts[piece.choice] += piece.text
        assert texts == {0: "bc", 1: "cd", 2: "bc", 3: "cd"}
        assert [one.num_prompt_tokens for one in answer.requests] == [3, 5]
        prompts = {
            client_id(one.request.request_id): len(one.request.prompt_token_ids) for one in cluster.prefills[0].submits
        }
        assert prompts == {"batch": 3, "batch.1": 3, "batch.2": 5, "batch.3": 5}
        with pytest.raises(InvalidRequest, match="65 answers to each of 2 prompts are more than the 128"):
            await front.answer([call("one", 65), call("two", 65)], None)


async def test_a_client_that_leaves_while_its_choices_are_submitted_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = {"small": {"max_concurrent_requests": 1, "requests_per_minute": 1}}
    async with fake_cluster(checkpoint, tenants=tenants) as cluster:
        sampling = SamplingParams(max_tokens=2)
        call = GenerateCall(
            "", "gone", TextPrompt("x"), sampling, has_max_tokens=True, has_seed=False, n=128, tenant="small"
        )
        dispatcher, begun = cluster.gateway.dispatcher, asyncio.Event()
        submit = dispatcher.submit

        def submit_and_tell(*arguments: Any, **named: Any) -> RequestStream:
            begun.set()
            return submit(*arguments, **named)

        monkeypatch.setattr(dispatcher, "submit", submit_and_tell)
        for num_turns in range(3):
            begun.clear()
            asking = asyncio.create_task(cluster.gateway.front.answer([call], None))
            await begun.wait()
            for _ in range(num_turns):
                await asyncio.sleep(0)
            assert not asking.done(), "the event loop has its turns in between"
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await cluster.wait_idle()
            assert cluster.holds_nothing()
            assert cluster.gateway.quotas.num_held("small") == 0
        answer = await cluster.gateway.front.answer([call], None)  # neither its name nor its quota is taken
        answer.abandon("enough")


async def test_prompts_without_a_seed_share_the_one_that_is_told(checkpoint: Path) -> None:
    calls = [
        GenerateCall("", "", TextPrompt(text), SamplingParams(max_tokens=1), has_max_tokens=True, has_seed=False)
        for text in ("one", "two")
    ]
    async with fake_cluster(checkpoint) as cluster:
        answer = await cluster.gateway.front.answer(calls, None)
        answer.abandon("enough")
        assert answer.is_over
        answer.abandon("twice is once")
        await cluster.wait_idle()
        first, second = answer.requests
        assert first.sampling.seed == second.sampling.seed


async def test_refused_once_every_choice_is_tried_elsewhere(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.prefills[0].script.refusals.append(refusal())
        events = await read_events(cluster.inference.Generate(choices_request(2)))
    assert texts_of(events, 2) == ["abcd", "bcde"]
