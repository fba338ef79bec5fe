"""The gateway over real gRPC in front of fake workers: what a client is streamed when all goes well."""

import asyncio
import re
from pathlib import Path

import pytest

from core.errors import RejectReason
from core.ids import RequestId
from core.request import Finish, FinishReason
from protos import inference_pb2 as pb
from protos import worker_pb2
from tests.fakes.cluster import fake_cluster, text_request
from tests.fakes.reading import collect
from tests.fakes.script import Reply, client_id, echo_alphabet, refusal


async def test_streams_every_token_once_with_usage_timing_and_placement(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        got = await collect(cluster.inference.Generate(text_request("hello", max_tokens=5, request_id="r-1")))
    assert got.text == "abcde"
    assert got.indices == [0, 1, 2, 3, 4]
    assert got.started is not None
    assert (got.started.request_id, got.started.model, got.started.prompt_tokens) == ("r-1", "fake", 5)
    assert got.finished.reason == pb.FINISH_REASON_LENGTH
    assert (got.finished.usage.prompt_tokens, got.finished.usage.completion_tokens) == (5, 5)
    placement, timing = got.finished.placement, got.finished.timing
    assert (placement.prefill_worker, placement.decode_worker, placement.attempts) == ("p0", "d0", 1)
    assert (placement.kv_tokens_sent, placement.kv_bytes, placement.kv_profile) == (5, 5 * 1024, "none")
    assert (placement.kv_lossless, placement.kv_wire_bytes) == (True, 5 * 1024 + 64)
    assert timing.queue_s + timing.route_s + timing.prefill_s == pytest.approx(timing.ttft_s)
    assert 0 < timing.ttft_s <= timing.total_s
    assert (timing.transfer_s, timing.first_decode_s) == (0.003, 0.004)


async def test_workers_are_told_everything(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        request = text_request("eight by", max_tokens=2, request_id="r-2")
        request.sampling.seed = 11
        await collect(cluster.inference.Generate(request))
        decode, prefill = cluster.decodes[0].submits[0], cluster.prefills[0].submits[0]
        assert isinstance(prefill, worker_pb2.PrefillSubmit)
        assert prefill.request == decode.request
        assert prefill.transfer_id == decode.transfer_id == prefill.request.request_id
        assert re.fullmatch(r"r-2/0\.[0-9a-f]{8}", prefill.transfer_id)
        assert (prefill.decode_worker_id, prefill.decode_epoch) == ("d0", 1)
        assert prefill.decode_address == cluster.decodes[0].address
        assert len(prefill.request.prompt_token_ids) == 8
        assert [len(one) for one in prefill.request.block_hashes] == [16, 16]
        assert prefill.request.sampling.seed == 11
        assert prefill.request.sampling.HasField("top_p"), "workers need no defaults"
        assert cluster.prefills[0].held == cluster.decodes[0].held == set()


async def test_a_request_of_one_token_needs_no_decode_worker(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        got = await collect(cluster.inference.Generate(text_request(max_tokens=1)))
        assert (got.text, got.indices) == ("a", [0])
        assert got.finished.placement.decode_worker == ""
        assert got.finished.placement.kv_bytes == 0
        assert cluster.decodes[0].submits == []
        prefill = cluster.prefills[0].submits[0]
        assert isinstance(prefill, worker_pb2.PrefillSubmit)
        assert prefill.transfer_id == ""


async def test_a_first_token_that_ends_the_request_frees_the_decode_worker(checkpoint: Path) -> None:
    def reply(request: worker_pb2.WorkRequest) -> Reply:
        return Reply(echo_alphabet(request).token_ids[:1], Finish(FinishReason.STOP, 256))

    async with fake_cluster(checkpoint, reply=reply) as cluster:
        got = await collect(cluster.inference.Generate(text_request(max_tokens=9, request_id="short")))
        assert got.finished.reason == pb.FINISH_REASON_STOP
        assert got.finished.stop_token_id == 256
        await cluster.decodes[0].wait_aborted("short")
        assert cluster.decodes[0].held == set()


async def test_news_of_the_decode_worker_may_overtake_the_first_token(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.prefills[0].script.go.clear()
        call = cluster.inference.Generate(text_request(max_tokens=4))
        await cluster.prefills[0].wait_submitted()
        cluster.network.landing(cluster.decodes[0].submits[0].transfer_id).set()
        await cluster.decodes[0].wait_until(lambda: not cluster.decodes[0].held)  # all its tokens are on their way
        cluster.prefills[0].script.go.set()
        got = await collect(call)
    assert (got.text, got.indices) == ("abcd", [0, 1, 2, 3])


async def test_characters_split_over_tokens_and_stop_strings_over_pieces(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)("naïve é STOP")["input_ids"]

    def reply(request: worker_pb2.WorkRequest) -> Reply:
        return Reply(tuple(ids), Finish(FinishReason.STOP, "STOP"))

    async with fake_cluster(checkpoint, reply=reply) as cluster:
        request = text_request(max_tokens=60)
        request.sampling.stop.append("STOP")
        got = await collect(cluster.inference.Generate(request))
    assert got.text == "naïve é "
    assert len(got.tokens) == len(ids), "tokens are all told; only the text is cut"
    assert got.finished.stop_string == "STOP"


async def test_logprobs_carry_the_tokens_texts(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        request = text_request(max_tokens=3)
        request.sampling.logprobs = 2
        got = await collect(cluster.inference.Generate(request))
    assert [token.logprob for token in got.tokens] == [-0.5] * 3
    assert [[other.token for other in token.top_logprobs] for token in got.tokens] == [["!", '"']] * 3


async def test_seeds_are_drawn_and_told(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        calls = [cluster.inference.Generate(pb.GenerateRequest(text="x")) for _ in range(2)]
        first, second = [await collect(call) for call in calls]
        assert first.started is not None
        assert second.started is not None
        assert first.started.seed != second.started.seed
        told = {submit.request.sampling.seed for submit in cluster.prefills[0].submits}
        assert told == {first.started.seed, second.started.seed}
        assert first.started.request_id != second.started.request_id


async def test_max_tokens_defaults_to_the_room_and_at_most_the_configured(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, default_max_tokens=20) as cluster:
        for prompt, expected in (("x", 20), ("x" * 500, 12)):
            request = pb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(temperature=0.0))
            got = await collect(cluster.inference.Generate(request))
            assert len(got.tokens) == expected


async def test_long_prompts_are_tokenised_off_the_loop_to_the_same_ids(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as here, fake_cluster(checkpoint, inline_prompt_bytes=0) as there:
        for cluster in (here, there):
            await collect(cluster.inference.Generate(text_request("the same words", max_tokens=2)))
        one, other = here.prefills[0].submits[0].request, there.prefills[0].submits[0].request
    assert one.prompt_token_ids == other.prompt_token_ids
    assert one.block_hashes == other.block_hashes


async def test_many_streams_at_once_share_the_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=2, num_decodes=2) as cluster:
        requests = [text_request(f"prompt {index}", max_tokens=12) for index in range(64)]
        results = await asyncio.gather(*(collect(cluster.inference.Generate(request)) for request in requests))
        assert all(got.text == "abcdefghijkl" and got.indices == list(range(12)) for got in results)
        assert cluster.gateway.dispatcher.num_active == cluster.gateway.dispatcher.num_queued == 0
        assert all(len(worker.submits) > 10 for worker in cluster.workers)


async def test_refused_work_goes_to_another_worker(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=2, num_decodes=2) as cluster:
        for worker in (cluster.prefills[0], cluster.decodes[0]):
            worker.script.always_refuse = refusal()
        for index in range(8):
            got = await collect(cluster.inference.Generate(text_request(request_id=f"r{index}")))
            assert (got.finished.placement.prefill_worker, got.finished.placement.decode_worker) == ("p1", "d1")
        asked = sum(len(worker.submits) for worker in cluster.workers)
        assert asked > 16, "somebody was asked and refused"
        by_request: dict[str, set[str]] = {}
        for submit in (*cluster.prefills[0].submits, *cluster.prefills[1].submits):
            by_request.setdefault(client_id(submit.request.request_id), set()).add(submit.transfer_id)
        assert all(len(transfers) == 1 for transfers in by_request.values()), "another P, the same transfer id"


async def test_all_refuse_for_a_while_then_the_queue_drains_in_order(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        decode = cluster.decodes[0]
        decode.script.always_refuse = refusal(RejectReason.NO_BLOCKS)
        calls = [cluster.inference.Generate(text_request(request_id=f"r{index}")) for index in range(6)]
        results = [asyncio.ensure_future(collect(call)) for call in calls]
        await decode.wait_until(lambda: len(decode.submits) >= 12)
        assert cluster.gateway.dispatcher.num_queued == 6
        decode.script.always_refuse = None
        for got in await asyncio.gather(*results):
            assert got.text == "abcde"
        order = [submit.request.request_id.split("/")[0] for submit in cluster.prefills[0].submits]
        assert order == [f"r{index}" for index in range(6)]


async def test_a_burst_spreads_by_in_flight_credit(checkpoint: Path) -> None:
    slow = {"modes": ["remote_prefill"], "priors": {"prefill_per_token_s": 1.0}}  # nothing is over before the burst is
    async with fake_cluster(checkpoint, num_prefills=4, num_decodes=4, routing=slow) as cluster:
        for worker in cluster.prefills:
            worker.script.go.clear()
        # Different prompts: where one is, its siblings follow.
        calls = [cluster.inference.Generate(text_request(f"{index:04}.", max_tokens=2)) for index in range(32)]
        results = [asyncio.ensure_future(collect(call)) for call in calls]
        for worker in cluster.prefills:
            await worker.wait_until(lambda worker=worker: len(worker.held) >= 8)  # type: ignore[misc]
        assert [len(worker.held) for worker in cluster.prefills] == [8] * 4
        assert [len(worker.held) for worker in cluster.decodes] == [8] * 4
        for worker in cluster.prefills:
            worker.script.go.set()
        await asyncio.gather(*results)


async def test_siblings_follow_the_prefix(checkpoint: Path) -> None:
    system = "You are a helpful assistant. "
    async with fake_cluster(checkpoint, num_prefills=4) as cluster:
        first = await collect(cluster.inference.Generate(text_request(system + "one", max_tokens=2)))
        assert first.finished.usage.cached_tokens == 0
        await cluster.wait_cache(len(system + "one") // 4)
        for question in ("two", "three", "four"):
            got = await collect(cluster.inference.Generate(text_request(system + question, max_tokens=2)))
            assert got.finished.placement.prefill_worker == first.finished.placement.prefill_worker
            assert got.finished.placement.reason == "prefix_hit"
            assert got.finished.usage.cached_tokens == 28
            chosen = next(one for one in cluster.prefills if one.worker_id == got.finished.placement.prefill_worker)
            submitted = chosen.submits[-1]
            assert isinstance(submitted, worker_pb2.PrefillSubmit)
            assert submitted.cached_tokens == 28, "the prefill worker is told what it should have"
            assert got.started is not None
            explained = cluster.gateway.dispatcher.placer.explanations.of(RequestId(got.started.request_id))
            assert [len(one.decision.candidates()) for one in explained] == [4]


async def test_the_terms_of_the_transfer_reach_the_prefill_worker(checkpoint: Path) -> None:
    tenants = {"bank": {"kv_quality": "exact"}}
    async with fake_cluster(checkpoint, kv_quality="high", tenants=tenants) as cluster:
        balanced = pb.KvQuality(level=pb.KV_QUALITY_LEVEL_BALANCED)
        for request in (
            text_request(),
            text_request(kv_quality=balanced, handoff_budget_s=0.25),
            text_request(kv_quality=balanced, tenant="bank"),
            text_request(kv_quality=pb.KvQuality(floor=0.5)),
        ):
            await collect(cluster.inference.Generate(request))
        found = []
        for submit in cluster.prefills[0].submits:
            assert isinstance(submit, worker_pb2.PrefillSubmit)
            budget_s = submit.handoff_budget_s if submit.HasField("handoff_budget_s") else None
            found.append((submit.kv_quality_floor, budget_s, submit.request.tenant))
        assert found == [(0.99, None, ""), (0.97, 0.25, ""), (1.0, None, "bank"), (0.5, None, "")]
        hashes = [tuple(submit.request.block_hashes) for submit in cluster.prefills[0].submits]
        assert hashes[0] == hashes[1] != hashes[2], "a tenant's prefix caches are its own"


async def test_a_scored_prompt_is_told_before_the_answer(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        request = text_request("hey", max_tokens=2, n=2)
        request.sampling.prompt_logprobs = 2
        events = [event async for event in cluster.inference.Generate(request)]
        scores = events[0].started.prompt_logprobs
        assert [one.token for one in scores] == ["h", "e", "y"]
        assert [one.logprob for one in scores] == [0.0, -0.25, -0.5]
        assert [one.HasField("logprob") for one in scores] == [False, True, True]
        assert [[other.token for other in one.top_logprobs] for one in scores] == [[], ["!", '"'], ["!", '"']]
        wants = [one.request.sampling.HasField("prompt_logprobs") for one in cluster.prefills[0].submits]
        assert sorted(wants) == [False, True], "one prompt is scored once"
        plain = await collect(cluster.inference.Generate(text_request("hey", max_tokens=2)))
        assert plain.started is not None
        assert len(plain.started.prompt_logprobs) == 0
