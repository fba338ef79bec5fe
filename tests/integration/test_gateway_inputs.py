"""What the gateway refuses, by status and field; and the calls beside Generate."""

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from core.rpc import field_violations
from protos import admin_pb2
from protos import inference_pb2 as pb
from router.tokenizer import GatewayTokenizer
from tests.fakes.checkpoint import ASSISTANT, END, MAX_MODEL_LEN, SPECIAL_TOKENS, USER, VOCAB_SIZE, write_checkpoint
from tests.fakes.cluster import FakeCluster, fake_cluster, text_request
from tests.fakes.reading import collect, fails

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LONG = grpc.StatusCode.OUT_OF_RANGE


def sampling(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**fields))  # type: ignore[arg-type]


def quality(**wanted: Any) -> pb.GenerateRequest:
    return text_request(kv_quality=pb.KvQuality(**wanted))


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    turns = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=turns))


BAD_REQUESTS: list[tuple[str, pb.GenerateRequest, grpc.StatusCode, str]] = [
    ("no-prompt", pb.GenerateRequest(), INVALID, "prompt"),
    ("empty-text", pb.GenerateRequest(text=""), INVALID, "text"),
    ("too-many-bytes", pb.GenerateRequest(text="é" * 600), INVALID, "text"),
    ("no-token-ids", pb.GenerateRequest(token_ids=pb.TokenIds()), INVALID, "token_ids"),
    ("token-outside", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, VOCAB_SIZE])), INVALID, "token_ids"),
    ("no-messages", chat(), INVALID, "chat.messages"),
    ("no-role", chat(("user", "a"), ("", "b")), INVALID, "chat.messages[1].role"),
    ("template-refuses", chat(("wizard", "a")), INVALID, "chat"),
    ("long-text", pb.GenerateRequest(text="x" * MAX_MODEL_LEN), LONG, "prompt"),
    ("long-ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 600)), LONG, "prompt"),
    ("max-tokens-do-not-fit", sampling(max_tokens=MAX_MODEL_LEN), LONG, "sampling.max_tokens"),
    ("min-tokens-do-not-fit", sampling(min_tokens=MAX_MODEL_LEN), LONG, "sampling.min_tokens"),
    ("id-with-slash", text_request(request_id="a/1"), INVALID, "request_id"),
    ("id-too-long", text_request(request_id="a" * 129), INVALID, "request_id"),
    ("negative-temperature", sampling(temperature=-0.1), INVALID, "sampling.temperature"),
    ("nan-temperature", sampling(temperature=float("nan")), INVALID, "sampling.temperature"),
    ("infinite-temperature", sampling(temperature=float("inf")), INVALID, "sampling.temperature"),
    ("zero-top-p", sampling(top_p=0.0), INVALID, "sampling.top_p"),
    ("big-top-p", sampling(top_p=1.01), INVALID, "sampling.top_p"),
    ("negative-top-k", sampling(top_k=-1), INVALID, "sampling.top_k"),
    ("big-min-p", sampling(min_p=1.5), INVALID, "sampling.min_p"),
    ("presence", sampling(presence_penalty=2.1), INVALID, "sampling.presence_penalty"),
    ("frequency", sampling(frequency_penalty=-2.1), INVALID, "sampling.frequency_penalty"),
    ("repetition", sampling(repetition_penalty=0.0), INVALID, "sampling.repetition_penalty"),
    ("zero-max-tokens", sampling(max_tokens=0), INVALID, "sampling.max_tokens"),
    ("negative-max-tokens", sampling(max_tokens=-5), INVALID, "sampling.max_tokens"),
    ("min-over-max", sampling(max_tokens=3, min_tokens=4), INVALID, "sampling.min_tokens"),
    ("negative-logprobs", sampling(logprobs=-1), INVALID, "sampling.logprobs"),
    ("many-logprobs", sampling(logprobs=21), INVALID, "sampling.logprobs"),
    ("empty-stop", sampling(stop=[""]), INVALID, "sampling.stop"),
    ("many-stops", sampling(stop=[str(index) for index in range(17)]), INVALID, "sampling.stop"),
    ("stop-id-outside", sampling(stop_token_ids=[VOCAB_SIZE]), INVALID, "sampling.stop_token_ids"),
    ("bias-outside", sampling(logit_bias={VOCAB_SIZE: 1.0}), INVALID, "sampling.logit_bias"),
    ("unknown-quality", quality(level=cast("pb.KvQualityLevel", 9)), INVALID, "terms.kv_quality"),
    ("floor-over-1", quality(floor=1.5), INVALID, "terms.kv_quality"),
    ("floor-below-0", quality(floor=-0.1), INVALID, "terms.kv_quality"),
    ("floor-not-a-number", quality(floor=float("nan")), INVALID, "terms.kv_quality"),
    ("negative-budget", text_request(handoff_budget_s=-1.0), INVALID, "terms.handoff_budget_s"),
    ("endless-budget", text_request(handoff_budget_s=float("inf")), INVALID, "terms.handoff_budget_s"),
    ("tenant-with-space", text_request(tenant="a b"), INVALID, "terms.tenant"),
    ("tenant-too-long", text_request(tenant="a" * 65), INVALID, "terms.tenant"),
    ("big-bias", sampling(logit_bias={1: 101.0}), INVALID, "sampling.logit_bias"),
]


async def test_bad_requests_are_refused_by_field_and_keep_nothing(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_prompt_bytes=1000) as cluster:
        for name, request, code, field in BAD_REQUESTS:
            error = await fails(cluster.inference.Generate(request), code)
            assert [found for found, _ in field_violations(error)] == [field], name
            assert (error.details() or "").startswith(field), name
        assert cluster.gateway.dispatcher.num_active == 0
        assert all(not worker.submits for worker in cluster.workers)
        assert (await collect(cluster.inference.Generate(text_request()))).text == "abcde"


async def test_everything_that_is_wrong_is_told_at_once(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, is_waited_for=False) as cluster:
        request = text_request(kv_quality=pb.KvQuality(floor=2.0), priority=11)
        request.sampling.top_p = 2.0
        request.sampling.max_tokens = 0
        error = await fails(cluster.inference.Generate(request), INVALID)
    fields = ["terms.kv_quality", "terms.priority", "sampling.top_p", "sampling.max_tokens"]
    assert [field for field, _ in field_violations(error)] == fields
    assert all(f"{field}: " in (error.details() or "") for field in fields)


UNDECODABLE = {
    "cut": b"\xff\xff\xff",
    "length-beyond-the-end": b"\x1a\x7fabc",
    "no-utf8": b"\x0a\x02\xff\xfe",  # of a text, the first field of all
}


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE.keys())
async def test_bytes_that_are_no_message_are_the_clients_mistake(checkpoint: Path, data: bytes) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, is_waited_for=False) as cluster:
        for method in ("Generate", "Chat", "Resume"):
            stream: Any = cluster.channel.unary_stream(f"/tandem.v1.Inference/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                [event async for event in stream(data, timeout=5.0)]
            assert failure.value.code() is INVALID, method
            assert [field for field, _ in field_violations(failure.value)] == ["request"]
        for method in ("Inference/Tokenize", "Admin/ExplainRequest", "Admin/ListKvDecisions"):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await cast("Any", cluster.channel.unary_unary(f"/tandem.v1.{method}"))(data, timeout=5.0)
            assert failure.value.code() is INVALID, method


async def test_detokenize_is_the_way_back(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, is_waited_for=False) as cluster:
        ids = (await cluster.inference.Tokenize(pb.TokenizeRequest(text="naïve 漢字"))).ids
        assert (await cluster.inference.Detokenize(pb.DetokenizeRequest(ids=ids))).text == "naïve 漢字"
        assert (await cluster.inference.Detokenize(pb.DetokenizeRequest())).text == ""
        many = pb.DetokenizeRequest(ids=list(ids) * 1000)
        assert (await cluster.inference.Detokenize(many)).text == "naïve 漢字" * 1000, "off the event loop"
        for request, code in (
            (pb.DetokenizeRequest(ids=[VOCAB_SIZE]), INVALID),
            (pb.DetokenizeRequest(ids=[1], model="gpt"), grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await cluster.inference.Detokenize(request)
            assert failure.value.code() is code


async def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    async with fake_cluster(write_checkpoint(tmp_path, chat=False), num_prefills=0, num_decodes=0) as cluster:
        error = await fails(cluster.inference.Generate(chat(("user", "hi"))), INVALID)
        assert "no chat template" in (error.details() or "")
        info = await cluster.inference.GetModelInfo(pb.GetModelInfoRequest())
        assert not info.has_chat_template
        assert (info.block_size, info.weights_version) == (0, ""), "known by workers only"


async def test_unknown_models_and_duplicates(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        await fails(cluster.inference.Generate(text_request(model="gpt")), grpc.StatusCode.NOT_FOUND)
        for call in (
            cluster.inference.GetModelInfo(pb.GetModelInfoRequest(model="gpt")),
            cluster.inference.Tokenize(pb.TokenizeRequest(model="gpt", text="x")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call
            assert failure.value.code() is grpc.StatusCode.NOT_FOUND
        cluster.prefills[0].script.go.clear()
        first = cluster.generate(text_request(request_id="same"))
        await cluster.prefills[0].wait_submitted()
        await fails(cluster.inference.Generate(text_request(request_id="same")), grpc.StatusCode.ALREADY_EXISTS)
        cluster.prefills[0].script.go.set()
        await first.read_all()
        again = await collect(cluster.inference.Generate(text_request(request_id="same")))
        assert again.text == "abcde", "an id is free again once its request is over"


async def test_a_full_queue_says_when_to_come_back(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, max_queued_requests=1) as cluster:
        cluster.decodes[0].script.is_silent = True
        first = cluster.generate(text_request())
        await cluster.decodes[0].wait_submitted()
        error = await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.RESOURCE_EXHAUSTED)
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        assert status is not None
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in status.details)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0
        first.cancel()


async def test_a_request_that_would_be_refused_anyway_is_not_tokenised(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_cluster(checkpoint, max_queued_requests=1, max_active_requests=2) as cluster:
        cluster.decodes[0].script.is_silent = True
        first = cluster.generate(text_request(request_id="first"))
        await cluster.decodes[0].wait_submitted()

        def encode(text: str) -> list[int]:
            raise AssertionError("tokenised")

        monkeypatch.setattr(GatewayTokenizer, "encode", lambda self, text: encode(text))
        await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.RESOURCE_EXHAUSTED)
        await fails(cluster.inference.Generate(text_request(request_id="first")), grpc.StatusCode.ALREADY_EXISTS)
        cluster.gateway.dispatcher.begin_drain()
        await fails(cluster.inference.Generate(text_request()), grpc.StatusCode.UNAVAILABLE)
        assert cluster.gateway.metrics.registry.get_sample_value(
            "tandem_gateway_rejected_total", {"reason": "queue_full"}
        )
        first.cancel()


async def test_a_message_above_the_public_limit_is_not_taken(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, max_request_bytes=100_000) as cluster:
        error = await fails(cluster.inference.Generate(text_request("x" * 100_001)), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "larger than max" in (error.details() or "")


async def test_tokenize_returns_what_generate_would_see(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0) as cluster:
        reply = await cluster.inference.Tokenize(pb.TokenizeRequest(text="hé", with_tokens=True))
        assert len(reply.ids) == 3
        assert list(reply.tokens) == ["h", "�", "�"]
        assert reply.max_model_len == MAX_MODEL_LEN
        turns = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")])
        reply = await cluster.inference.Tokenize(pb.TokenizeRequest(chat=turns, with_tokens=True))
        assert list(reply.tokens) == [USER, "a", ASSISTANT]
        assert set(SPECIAL_TOKENS) - {END} < set(reply.tokens)
        for request, field in ((pb.TokenizeRequest(), "input"), (pb.TokenizeRequest(text=""), "text")):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await cluster.inference.Tokenize(request)
            assert [name for name, _ in field_violations(failure.value)] == [field]


async def test_limits_follow_the_configuration_and_the_workers(checkpoint: Path) -> None:
    async def told(cluster: FakeCluster) -> int:
        return (await cluster.inference.GetModelInfo(pb.GetModelInfoRequest())).max_model_len

    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0, max_model_len=100) as cluster:
        assert await told(cluster) == 100
    async with fake_cluster(checkpoint) as cluster:
        assert await told(cluster) == MAX_MODEL_LEN
        cluster.decodes[0].max_model_len = 64
        await cluster.decodes[0].register()
        records = cluster.gateway.fleet.records
        await cluster.wait_fleet(lambda: min(record.max_model_len for record in records.values()) == 64)
        assert await told(cluster) == 64
        await fails(cluster.inference.Generate(text_request("x" * 64)), LONG)


async def test_reflection_describes_the_services(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0) as cluster:

        def describe() -> tuple[set[str], list[str]]:
            with grpc.insecure_channel(cluster.address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                pool = DescriptorPool(database)
                service = pool.FindServiceByName("tandem.v1.Inference")
                return set(database.get_services()), [method.name for method in service.methods]

        services, methods = await asyncio.to_thread(describe)
    assert services >= {"tandem.v1.Inference", "tandem.v1.Admin", "grpc.health.v1.Health"}
    assert methods == ["Generate", "Chat", "Resume", "Abort", "GetModelInfo", "Tokenize", "Detokenize"]


async def test_status_shows_load_and_requests_in_flight(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        cluster.prefills[0].script.go.clear()
        call = cluster.generate(text_request(request_id="r"))
        await cluster.prefills[0].wait_submitted()
        reply = await cluster.admin.GetClusterStatus(admin_pb2.GetClusterStatusRequest())
        by_id: dict[str, admin_pb2.WorkerStatus] = {worker.worker_id: worker for worker in reply.workers}
        assert (reply.active_requests, by_id["p0"].in_flight, by_id["d0"].in_flight) == (1, 1, 1)
        assert by_id["d0"].role == "decode"
        assert by_id["d0"].address == cluster.decodes[0].address
        assert by_id["d0"].metrics_port == 9100
        cluster.prefills[0].script.go.set()
        await call.read_all()


async def test_abort_needs_an_id(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, num_prefills=0, num_decodes=0) as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await cluster.inference.Abort(pb.AbortRequest())
        assert failure.value.code() is INVALID
