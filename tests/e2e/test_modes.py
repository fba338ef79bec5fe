"""One real cluster that may serve in every mode: the same tokens in each, what clients are told, and whole pools lost.

Gateways of the test's own force a mode where the cluster's own chooses. The tests share the cluster; each leaves it
whole, with every block back.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import pytest_asyncio

from cluster.demo.report import placement_problems
from core.errors import RejectedError, RejectReason
from tandem_client import Client, Generation, Service, ServingError
from tests.e2e.cluster_process import ClusterProcess, running_cluster, tandem, tiny_config
from tests.e2e.generations import (
    PROMISE_S,
    Load,
    Stream,
    by_transformers,
    greedy,
    ids_of,
    is_idle,
    make_prompts,
    until_begun,
)
from tests.e2e.mode_gateways import mode_gateway
from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(240)]

_MAX_REQUESTS = 4  # of a decode worker
_TENANTS = {
    "counted": {"requests_per_minute": 2},
    "single": {"max_concurrent_requests": 1},
    "brief": {"tokens_per_minute": 40},
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, redis: RedisProcess) -> AsyncIterator[ClusterProcess]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    await asyncio.to_thread(int)  # its thread lives as long as the loop, so no single test leaks it
    router = {"port": 0, "tenants": _TENANTS}
    config = tiny_config("modes", router=router, redis={"url": redis.url})
    config["decode"] = cast(dict[str, object], config["decode"]) | {"max_requests": _MAX_REQUESTS}
    async with running_cluster(tmp_path_factory.mktemp("run"), config) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts()


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    return by_transformers(prompts)


def modes_of(results: Sequence[Generation]) -> set[str]:
    """Check that every placement keeps the promises of its mode; return the modes."""
    for result in results:
        assert list(placement_problems(result.summary)) == [], result.summary
    return {result.summary.placement.mode for result in results}


@contextlib.asynccontextmanager
async def full_decode_pool(cluster: ClusterProcess, redis: RedisProcess) -> AsyncIterator[Load]:
    """Streams that are all that the decode workers take, until they are left."""
    async with mode_gateway(cluster, redis.url, "early") as early:
        load = Load(early.client)
        try:
            await load.start([[17 + n, *range(100, 110)] for n in range(2 * _MAX_REQUESTS)])
            yield load
        finally:
            await load.leave()


@pytest.mark.parametrize("way", ["early", "local", "colocated"])
async def test_a_mode_gives_the_tokens_of_transformers(
    cluster: ClusterProcess, redis: RedisProcess, way: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with mode_gateway(cluster, redis.url, way) as forced:
        alone = [await greedy(forced.client, prompt) for prompt in prompts]
        again = [await greedy(forced.client, prompt) for prompt in prompts]
        at_once = await asyncio.gather(*(greedy(forced.client, prompt) for prompt in prompts))
    for results in (alone, again, at_once):
        assert [ids_of(result) for result in results] == expected
    modes = modes_of([*alone, *again, *at_once])
    placements = [result.summary.placement for result in again]
    if way == "early":
        assert modes == {"remote_prefill"}
        assert {placement.binding for placement in placements} == {"early"}
    elif way == "colocated":
        assert modes == {"colocated"}
    else:
        held = [placement.mode for placement, prompt in zip(placements, prompts, strict=True) if len(prompt) > 32]
        assert set(held) == {"local_prefill"}
        for result in again:
            if result.summary.placement.mode == "local_prefill":
                assert result.summary.usage.cached_tokens > 0, result.summary
    await cluster.until_status(is_idle)


async def test_a_prompt_is_bound_late_when_the_decode_pool_is_full(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with mode_gateway(cluster, redis.url, "late") as late:
        async with full_decode_pool(cluster, redis) as load:
            streams = [Stream(late.client, prompt) for prompt in prompts]
            await until_begun(streams)
            is_any_done = any(stream.task.done() for stream in streams)
            # A context is not endless: on a slow machine a stream that fills the pool ends, and others take its place.
            was_full = not any(task.done() for task in load.tasks)
            assert not (was_full and is_any_done), "nobody has room to decode them"
        results = [await stream.task for stream in streams]
    assert [ids_of(result) for result in results] == expected
    modes_of(results)
    bindings = Counter(result.summary.placement.binding for result in results)
    assert set(bindings) == {"late"} if was_full else bindings["late"]
    await cluster.until_status(is_idle)


async def test_a_prompt_that_nobody_takes_over_stays_where_it_is(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with mode_gateway(cluster, redis.url, "kept") as kept, full_decode_pool(cluster, redis) as load:
        results = await asyncio.gather(*(greedy(kept.client, prompt) for prompt in prompts[:3]))
        assert load.failures.empty(), load.failures.get_nowait()
        assert not any(task.done() for task in load.tasks), "the decode pool was not full all the time"
    assert [ids_of(result) for result in results] == expected[:3]
    assert modes_of(results) == {"colocated"}
    assert {result.summary.placement.mode_reason for result in results} == {"no_decode_pool"}
    await cluster.until_status(is_idle)


async def test_a_session_stays_with_its_workers(cluster: ClusterProcess, prompts: list[list[int]]) -> None:
    async with Client(cluster.address) as client:
        for session in ("one", "two", "three"):
            places = []
            for turn in range(4):  # too short for a block of a prefix cache: only the session draws them together
                result = await client.generate_text(
                    [500 + turn, 501], temperature=0.0, max_tokens=4, service=Service(session_id=session)
                )
                places.append((result.summary.placement.prefill_worker, result.summary.placement.decode_worker))
            assert len(set(places)) == 1, places


async def test_commands_tell_why(cluster: ClusterProcess) -> None:
    code, out, err = await tandem(cluster.folder, "generate", "import os", "-t", "0", "-n", "4", "--why")
    assert (code, len(err)) == (0, 1), err
    request_id, _, told = err[0].partition(": ")
    assert "first token after" in told
    mode = told.split()[0]
    code, out, err = await tandem(cluster.folder, "explain", request_id)
    assert (code, err) == (0, [])
    assert f"request {request_id}" in out[0]
    assert mode in out[0]
    assert any(line.startswith("observed") and "TTFT" in line for line in out), "\n".join(out[-8:])
    code, out, err = await tandem(cluster.folder, "explain", request_id, "--json")
    (decision,) = json.loads("\n".join(out))
    assert (decision["request_id"], decision["mode"]) == (request_id, mode)
    assert decision["winner"] == decision["candidates"][0]
    assert sum(decision["winner"]["terms_s"].values()) == pytest.approx(decision["winner"]["total_s"], abs=1e-6)
    assert len(decision["candidates"]) > 1
    assert decision["outcome"]["ttft_s"] > 0
    code, out, err = await tandem(cluster.folder, "explain", "no-such-request")
    assert code == 1
    assert "no gateway knows" in err[0]


async def test_a_tenant_is_told_that_its_quota_is_used_up(cluster: ClusterProcess) -> None:
    async with Client(cluster.address, tenant="counted", max_retries=0) as client:
        for _ in range(2):
            await client.generate_text("import", max_tokens=1)
        with pytest.raises(RejectedError) as refused:
            await client.generate_text("import", max_tokens=1)
    assert refused.value.reason is RejectReason.RATE_LIMITED
    assert 0.0 < refused.value.retry_after_s <= 60.0
    async with Client(cluster.address, tenant="single", max_retries=0) as client:
        first = Stream(client, [10, 11, 12], max_tokens=1500)
        await until_begun([first])
        with pytest.raises(RejectedError) as refused:
            await client.generate_text("import", max_tokens=1)
        assert refused.value.reason is RejectReason.CONCURRENCY
        assert refused.value.retry_after_s > 0.0
        await first.leave()
        await cluster.until_status(is_idle)
        await client.generate_text("import", max_tokens=1)
    code, _, err = await tandem(
        cluster.folder, "generate", "import", "-n", "1", "--tenant", "counted", "--deadline", "5"
    )
    assert code == 1
    assert "rate_limited" in err[0]


async def test_who_cannot_wait_goes_first(cluster: ClusterProcess, redis: RedisProcess) -> None:
    asked = [("batch", 0), ("batch", 9), ("interactive", 0), ("interactive", 9)]
    order: list[tuple[str, int]] = []
    async with mode_gateway(cluster, redis.url, "early") as early, full_decode_pool(cluster, redis) as fillers:

        async def one(service_class: str, priority: int) -> None:
            service = Service(service_class, priority)
            pieces = early.client.generate(
                [700, 701], temperature=0.0, max_tokens=200, ignore_eos=True, service=service
            )
            async for piece in pieces:
                if piece.tokens and piece.tokens[0].index == 0:
                    order.append((service_class, priority))

        waiting = []
        for service_class, priority in asked:
            waiting.append(asyncio.create_task(one(service_class, priority)))
            async with asyncio.timeout(10):
                while early.gateway.dispatcher.num_queued < len(waiting):  # noqa: ASYNC110 - a queue tells nobody
                    await asyncio.sleep(0.01)
        await fillers.leave_one()
        async with asyncio.timeout(30):
            await asyncio.gather(*waiting)
    assert order[0][0] == "interactive", order  # the next ones ask at the same time, and who is accepted is chance
    assert sorted(order) == sorted(asked)
    await cluster.until_status(is_idle)


async def test_whole_pools_die_and_come_back(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Of every stream either all tokens come, or the client is told; and one pool alone serves meanwhile."""
    async with (
        Client(cluster.address, max_retries=0) as client,
        mode_gateway(cluster, redis.url, "late") as late,
        mode_gateway(cluster, redis.url, "early") as early,
    ):
        async with full_decode_pool(cluster, redis) as load:
            held = [Stream(late.client, prompt) for prompt in prompts[:6]]
            await until_begun(held)
            before = dict(cluster.epochs)
            await lose_pool(cluster, "decode")
            for error in await load.failed_within(2 * _MAX_REQUESTS, PROMISE_S):
                assert error.grpc_code == "UNAVAILABLE", error
            alone = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
            assert [ids_of(result) for result in alone] == expected
            assert modes_of(alone) == {"colocated"}
            assert {result.summary.placement.mode_reason for result in alone} == {"no_decode_pool"}
            assert not all(stream.task.done() for stream in held), "their KV waits for a decode worker"
            victim = await lose_one_of_two(cluster, client, prompts)
            await restarted(cluster, "decode-0", "decode-1", victim, since=before)
        outcomes = await asyncio.gather(*(stream.task for stream in held), return_exceptions=True)
        for outcome, tokens in zip(outcomes, expected, strict=False):
            if isinstance(outcome, Generation):
                assert ids_of(outcome) == tokens
                assert outcome.summary.placement.binding == "late"
            else:
                assert isinstance(outcome, ServingError), outcome
                assert outcome.grpc_code == "UNAVAILABLE", outcome
        on_decode = Load(early.client)
        await on_decode.start(prompts[:4])
        before = dict(cluster.epochs)
        await lose_pool(cluster, "prefill")
        alone = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
        assert [ids_of(result) for result in alone] == expected
        for result in alone:
            placement = result.summary.placement
            assert (placement.mode, placement.mode_reason) in (
                ("colocated", "no_prefill_pool"),
                ("local_prefill", "prefix_at_decode"),
            )
        modes_of(alone)
        assert on_decode.failures.empty(), "prefill workers are nothing to them any more"
        await on_decode.leave()
        await restarted(cluster, "prefill-0", "prefill-1", since=before)
        await cluster.until_status(is_idle)
        after = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
    assert [ids_of(result) for result in after] == expected
    modes_of(after)
    assert not {result.summary.placement.mode_reason for result in after} & {"no_prefill_pool", "no_decode_pool"}
    await cluster.until_status(is_idle)


async def lose_pool(cluster: ClusterProcess, role: str) -> None:
    for index in range(2):
        cluster.kill(f"{role}-{index}")
    await cluster.until_status(lambda status: not any(w.connected for w in status.workers if w.role == role))


async def lose_one_of_two(cluster: ClusterProcess, client: Client, prompts: Sequence[Sequence[int]]) -> str:
    """Kill one of two prefill workers that generate: its streams fail, the others go on. Returns its name."""
    load = Load(client)
    await load.start(prompts[:4])
    generating = [worker for worker in (await cluster.status()).workers if worker.role == "prefill"]
    victim = max(generating, key=lambda worker: worker.in_flight)
    assert victim.in_flight > 0
    cluster.kill(victim.worker_id)
    for error in await load.failed_within(victim.in_flight, PROMISE_S):
        assert error.grpc_code == "UNAVAILABLE", error
    await load.leave()
    assert load.failures.empty(), "more requests failed than the dead worker held"
    return victim.worker_id


async def restarted(cluster: ClusterProcess, *names: str, since: Mapping[str, int]) -> None:
    """Wait until all of them have a newer epoch than then, and every worker is reached."""
    if not all(cluster.epochs[name] > since[name] for name in names):
        await cluster.until_line(lambda line: all(cluster.epochs[name] > since[name] for name in names))
    await cluster.until_status(lambda status: sum(worker.connected for worker in status.workers) == 4)
