"""A client that knows nothing of Tandem, and learns everything by reflection: what grpcurl and its like do."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.symbol_database import SymbolDatabase
from grpc_requests.aio import AsyncClient  # type: ignore[import-untyped]

from tests.fakes.cluster import fake_cluster

INFERENCE = "tandem.v1.Inference"


def stock_client(address: str) -> Any:
    """With a pool of its own: it must not find the descriptors that this process has."""
    pool = DescriptorPool()
    return AsyncClient(address, descriptor_pool=pool, symbol_db=SymbolDatabase(pool=pool))


async def told(client: Any, method: str, request: dict[str, Any]) -> Any:
    return await client.request(INFERENCE, method, request)


async def streamed(client: Any, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    return [event async for event in await client.request(INFERENCE, method, request)]


async def test_every_service_is_found_and_every_call_answered(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, stock_client(cluster.address) as client:
        names = set(await client.service_names())
        assert names == {
            INFERENCE,
            "tandem.v1.Admin",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        health = await client.request("grpc.health.v1.Health", "Check", {"service": INFERENCE})
        assert health == {"status": "SERVING"}
        sampling = {"temperature": 0.0, "max_tokens": 3, "logprobs": 1}
        events = await streamed(client, "Generate", {"text": "hello", "sampling": sampling, "n": 2})
        assert [int(one.get("event_index", 0)) for one in events] == list(range(len(events)))
        assert events[0]["started"]["prompt_tokens"] == 5
        for choice in range(2):
            deltas = [
                one["delta"] for one in events if one.get("delta", {}).get("choice", 0) == choice and "delta" in one
            ]
            assert "".join(one.get("text", "") for one in deltas) == "abc"
            assert [token["token"] for one in deltas for token in one["tokens"]] == list("abc")
        assert sum("finished" in one for one in events) == 2
        messages = [{"role": "user", "content": "hi"}]
        events = await streamed(client, "Chat", {"messages": messages, "sampling": sampling})
        assert "".join(one.get("delta", {}).get("content", "") for one in events) == "abc"
        assert events[-1]["finished"]["reason"] == "FINISH_REASON_LENGTH"
        tokenized = await told(client, "Tokenize", {"text": "hé", "with_tokens": True})
        assert len(tokenized["ids"]) == 3
        assert (await told(client, "Detokenize", {"ids": tokenized["ids"]})) == {"text": "hé"}
        assert (await told(client, "GetModelInfo", {}))["model"] == "fake"
        assert not (await told(client, "Abort", {"request_id": "nobody"})).get("found", False)
        status = await client.request("tandem.v1.Admin", "GetClusterStatus", {})
        assert [one["worker_id"] for one in status["workers"]] == ["d0", "p0"]


async def test_what_is_wrong_is_told_in_the_status(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, stock_client(cluster.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await streamed(client, "Generate", {"text": "x", "sampling": {"top_p": 7.0}})
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "sampling.top_p" in (refused.value.details() or "")
