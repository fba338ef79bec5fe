"""Several gateways on one port, of gRPC and of HTTP: connections come to all, and to none that is leaving."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.redis_server import free_ports
from core.clock import MonotonicClock
from core.errors import ConfigError
from core.rpc import connect
from core.store_memory import MemoryStore
from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.service import Gateway
from tests.fakes.cluster import text_request
from tests.fakes.gateways import Gateways, several_gateways
from tests.fakes.http import CHAT
from tests.fakes.reading import Reading
from tests.fakes.script import PATIENCE_S

NUM_CALLS = 24  # that connections of all of them come to one gateway happens once in 8 million times
ANSWERS = ["abcde"] * NUM_CALLS


async def over_grpc(address: str) -> str:
    """One call over a connection of its own, made anew if a gateway left while it came in."""
    for attempt in range(3):
        try:
            async with connect(address) as channel:
                reading = Reading(inference_pb2_grpc.InferenceStub(channel).Generate(text_request()))
                await reading.read_all()
                return reading.text
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == 2:
                raise
    raise AssertionError


async def over_http(address: str) -> str:
    """As `over_grpc`."""
    for attempt in range(3):
        try:
            async with httpx.AsyncClient(base_url=f"http://{address}", timeout=PATIENCE_S, trust_env=False) as client:
                reply = await client.post("/v1/chat/completions", json=CHAT)
        except httpx.TransportError:
            if attempt == 2:
                raise
        else:
            assert reply.status_code == 200, reply.text
            return str(reply.json()["choices"][0]["message"]["content"])
    raise AssertionError


def calls(cluster: Gateways) -> "list[asyncio.Task[str]]":
    """Half of them over each protocol."""
    seat, count = cluster.seats[0], NUM_CALLS // 2
    grpc_calls = [asyncio.create_task(over_grpc(seat.address)) for _ in range(count)]
    return grpc_calls + [asyncio.create_task(over_http(seat.gateway.http_address)) for _ in range(count)]


def shared_ports() -> dict[str, Any]:
    grpc_port, http_port = free_ports(2)
    return {"port": grpc_port, "http": {"port": http_port}, "share_port": True}


async def test_connections_come_to_all_who_share_a_port_and_to_none_that_leaves(
    tmp_path: Path, checkpoint: Path
) -> None:
    async with several_gateways(tmp_path, checkpoint, 2, num_prefills=1, num_decodes=1, **shared_ports()) as cluster:
        leaving, staying = cluster.seats
        assert leaving.address == staying.address
        assert leaving.gateway.http_address == staying.gateway.http_address
        for ask, address in ((over_grpc, leaving.address), (over_http, leaving.gateway.http_address)):
            hold = cluster.prefills[0].script.go
            hold.clear()
            asked = len(cluster.prefills[0].submits)
            running = [asyncio.create_task(ask(address)) for _ in range(NUM_CALLS)]
            await cluster.prefills[0].wait_submitted(asked + NUM_CALLS)
            shares = [seat.gateway.dispatcher.num_active for seat in cluster.seats]
            assert sum(shares) == NUM_CALLS
            assert all(shares), "both got connections"
            hold.set()
            assert await asyncio.gather(*running) == ANSWERS

        hold.clear()
        asked = len(cluster.prefills[0].submits)
        running = calls(cluster)
        await cluster.prefills[0].wait_submitted(asked + NUM_CALLS)
        assert leaving.gateway.dispatcher.num_active > 0
        at_staying = staying.gateway.dispatcher.num_active
        stopping = asyncio.create_task(leaving.gateway.stop(PATIENCE_S))
        await asyncio.sleep(0)
        later = calls(cluster)
        await cluster.prefills[0].wait_submitted(asked + 2 * NUM_CALLS)
        assert staying.gateway.dispatcher.num_active == at_staying + NUM_CALLS
        hold.set()
        assert await asyncio.gather(*running) == ANSWERS, "what ran at the gateway that left was finished there"
        assert await asyncio.gather(*later) == ANSWERS
        async with asyncio.timeout(PATIENCE_S):
            await stopping


@pytest.mark.parametrize("door", ["port", "http"])
async def test_a_port_is_shared_only_by_those_who_say_so(checkpoint: Path, door: str) -> None:
    ports = shared_ports()

    def gateway(**settings: Any) -> Gateway:
        config = RouterConfig.model_validate({"model_path": checkpoint, **ports, **settings})
        return Gateway(config, "c", MemoryStore(), MonotonicClock())

    first = gateway()
    await first.start()
    try:
        alone = gateway(share_port=False, **({"http": {"port": 0}} if door == "port" else {"port": 0}))
        with pytest.raises(ConfigError, match="in use"):
            await alone.start()
    finally:
        await first.stop(0.0)
