"""Three gateway processes and a real Redis, of which one gateway and then Redis are killed under load."""

import asyncio

import grpc
import pytest

from benchmarks.paced_worker import Pace
from benchmarks.replica_bed import bed
from benchmarks.replica_load import Client, Workload
from core.rpc import connect
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

pytestmark = pytest.mark.slow
LEASE_S = 2.0


async def test_a_killed_gateway_and_a_killed_redis_cost_only_what_they_were_streaming() -> None:
    arrivals = Workload(rate=10.0, duration_s=6.0, seed=3).arrivals()
    tenants = {"narrow": {"max_concurrent_requests": 1}}
    quotas = {"slot_lease_s": LEASE_S, "retry_interval_s": 0.1}
    async with bed(3, 4, 2, Pace(), tenants=tenants, quotas=quotas) as cluster:
        client = Client([gateway.address for gateway in cluster.gateways])
        running = asyncio.create_task(client.run(arrivals))
        await asyncio.sleep(1.5)
        held = asyncio.create_task(one_long_request(cluster.gateways[2].address))
        await asyncio.sleep(0.5)
        assert await refusal(cluster.gateways[0].address), "the tenant's one slot is held at another gateway"
        await cluster.gateways[2].kill()
        await asyncio.sleep(1.0)
        await cluster.kill_redis()
        await asyncio.sleep(1.0)
        await cluster.start_redis()
        results = await running
        assert not (await held)
        await client.close()
        lost = [one for one in results if not one.is_finished]
        assert all(one.num_tokens and "UNAVAILABLE" in one.error for one in lost), [one.error for one in lost]
        assert len(lost) <= 6, "at most what one of three gateways streamed at that moment"
        assert all(one.indices == list(range(len(one.indices))) for one in results)
        assert any(one.attempts > 1 for one in results), "nobody met the killed gateway"
        async with asyncio.timeout(10.0):
            while await refusal(cluster.gateways[0].address):  # until the lease of the killed gateway's slot ends
                pass
        for gateway in cluster.gateways[:2]:
            status = await gateway.status()
            assert sum(one.connected for one in status.workers) == 6
            assert status.active_requests == 0


def narrow_request(max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(300, 400)), sampling=sampling, terms=pb.RequestTerms(tenant="narrow")
    )


async def one_long_request(address: str) -> bool:
    """Return whether it came to its end."""
    async with connect(address) as channel:
        try:
            async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(narrow_request(1000), timeout=60.0):
                pass
        except grpc.aio.AioRpcError:
            return False
    return True


async def refusal(address: str) -> bool:
    """Return whether the tenant may have no request more."""
    code = None
    async with connect(address) as channel:
        try:
            async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(narrow_request(1), timeout=10.0):
                pass
        except grpc.aio.AioRpcError as error:
            code = error.code()
    assert code in (None, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return code is not None
