"""Tenants' quotas at two real gateways with one real Redis, which dies and comes back."""

from pathlib import Path

import grpc

from tests.fakes.cluster import text_request
from tests.fakes.gateways import several_gateways
from tests.fakes.script import refusal

TENANTS = {
    "slow": {"requests_per_minute": 4},
    "brief": {"tokens_per_minute": 60},
    "narrow": {"max_concurrent_requests": 2},
}


async def test_a_rate_holds_over_both_gateways(tmp_path: Path, checkpoint: Path) -> None:
    async with several_gateways(tmp_path, checkpoint, 2, tenants=TENANTS) as cluster:
        for n in range(4):
            await cluster.seats[n % 2].generate(text_request(tenant="slow")).read_all()
        for seat in cluster.seats:
            error = await seat.generate(text_request(tenant="slow")).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert "4 requests per minute" in (error.details() or "")
        await cluster.seats[0].generate(text_request(tenant="free")).read_all()


async def test_tokens_count_as_used_not_as_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    async with several_gateways(tmp_path, checkpoint, 2, tenants=TENANTS) as cluster:
        first, second = cluster.seats
        request = text_request("hello", max_tokens=20, tenant="brief")  # 25 in all, and 20 at least expected
        await first.generate(request).read_all()
        await second.generate(request).read_all()
        error = await first.generate(request).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "60 tokens per minute" in (error.details() or "")
        await second.generate(text_request("hi", max_tokens=1, tenant="brief")).read_all()


async def test_a_prompt_that_no_worker_took_is_not_charged(tmp_path: Path, checkpoint: Path) -> None:
    async with several_gateways(tmp_path, checkpoint, 1, tenants=TENANTS) as cluster:
        cluster.redis.kill()  # so that what is given back counts at once
        [seat] = cluster.seats
        for worker in cluster.prefills:
            worker.script.always_refuse = refusal()
        given_up = seat.generate(text_request("x" * 40, max_tokens=1, tenant="brief"))
        refused = cluster.prefills[0]
        await refused.wait_until(lambda: len(refused.submits) > 0)
        given_up.cancel()
        assert await seat.gateway.dispatcher.wait_idle(10.0)
        for worker in cluster.prefills:
            worker.script.always_refuse = None
        await seat.generate(text_request("x" * 40, max_tokens=1, tenant="brief")).read_all()
        await seat.generate(text_request("x" * 40, max_tokens=1, tenant="brief")).fails(
            grpc.StatusCode.RESOURCE_EXHAUSTED
        )


async def test_requests_at_once_hold_over_both_gateways_and_come_back(tmp_path: Path, checkpoint: Path) -> None:
    async with several_gateways(tmp_path, checkpoint, 2, tenants=TENANTS) as cluster:
        second = cluster.seats[1]
        for worker in cluster.prefills:
            worker.script.go.clear()
        held = [
            seat.generate(text_request(tenant="narrow", request_id=f"r{n}")) for n, seat in enumerate(cluster.seats)
        ]
        for n in range(2):
            await cluster.wait_prefilling(f"r{n}")
        error = await second.generate(text_request(tenant="narrow")).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "as many as it may" in (error.details() or "")
        held[0].cancel()
        await cluster.wait_aborted("r0")
        for worker in cluster.prefills:
            worker.script.go.set()
        await held[1].read_all()
        await second.generate(text_request(tenant="narrow")).read_all()


async def test_without_redis_each_gateway_gives_its_part_and_with_it_they_count_together(
    tmp_path: Path, checkpoint: Path
) -> None:
    async with several_gateways(tmp_path, checkpoint, 2, tenants=TENANTS) as cluster:
        await cluster.until(lambda: all(seat.gateway.replicas.num_replicas == 2 for seat in cluster.seats))
        cluster.redis.kill()
        for seat in cluster.seats:
            for _ in range(2):
                await seat.generate(text_request(tenant="slow")).read_all()
            await seat.generate(text_request(tenant="slow")).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        for worker in cluster.prefills:
            worker.script.go.clear()
        held = [
            seat.generate(text_request(tenant="narrow", request_id=f"r{n}")) for n, seat in enumerate(cluster.seats)
        ]
        for n in range(2):
            await cluster.wait_prefilling(f"r{n}")
        for seat in cluster.seats:
            await seat.generate(text_request(tenant="narrow")).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        cluster.redis.start()
        await cluster.until(lambda: all(not seat.gateway.quotas.is_store_lost for seat in cluster.seats))
        error = await cluster.seats[0].generate(text_request(tenant="narrow")).fails(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "has 2 requests in the cluster" in (error.details() or ""), "the empty store was told of both"
        for worker in cluster.prefills:
            worker.script.go.set()
        for call in held:
            await call.read_all()
        await cluster.seats[0].generate(text_request(tenant="narrow")).read_all()
