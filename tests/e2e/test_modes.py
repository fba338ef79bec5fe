"""One real cluster that may serve in every mode: the same tokens in each, what clients are told, and whole pools lost.

Gateways of the test's own force a mode where the cluster's own chooses. The tests share the cluster; each leaves it
whole, with every block back.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import pytest_asyncio

from cluster.demo.report import placement_problems
from core.errors import RejectedError, RejectReason
from core.ids import WorkerId
from core.membership import Role
from router.prompt_hashes import PromptHashes
from router.routing.config import RoutingConfig
from router.routing.held import held_prefixes
from router.service import Gateway
from tandem_client import Client, Generation, Service, ServingError
from tests.e2e.cluster_process import PATIENCE_S, ClusterProcess, running_cluster, tandem, tiny_config
from tests.e2e.generations import (
    PROMISE_S,
    Load,
    Stream,
    greedy,
    ids_of,
    is_idle,
    until_begun,
)
from tests.e2e.held_places import full_decode_pool
from tests.e2e.mode_gateways import mode_gateway
from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(240)]

_MAX_REQUESTS = 4  # of a decode worker
_NO_TIMEOUT_S = 300.0  # more than a test has
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
    config["prefill"] = cast(dict[str, object], config["prefill"]) | {"bind_timeout_s": _NO_TIMEOUT_S}
    config["decode"] = cast(dict[str, object], config["decode"]) | {"max_requests": _MAX_REQUESTS}
    async with running_cluster(tmp_path_factory.mktemp("run"), config) as cluster:
        yield cluster


def modes_of(results: Sequence[Generation]) -> set[str]:
    """Check that every placement keeps the promises of its mode; return the modes."""
    for result in results:
        assert list(placement_problems(result.summary)) == [], result.summary
    return {result.summary.placement.mode for result in results}


@pytest.mark.parametrize("way", ["early", "local", "colocated"])
async def test_a_mode_gives_the_tokens_of_transformers(
    cluster: ClusterProcess, redis: RedisProcess, way: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with mode_gateway(cluster, redis.url, way) as forced:
        if way == "local":
            await prefixes_at_decode(cluster, redis, forced.gateway, prompts)
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


async def prefixes_at_decode(
    cluster: ClusterProcess, redis: RedisProcess, gateway: Gateway, prompts: Sequence[Sequence[int]]
) -> None:
    """Have decode workers hold the prompts, and wait until `gateway` knows: what caches hold it learns in its time."""
    async with mode_gateway(cluster, redis.url, "early") as early:
        await asyncio.gather(*(greedy(early.client, prompt) for prompt in prompts))
    fleet = gateway.fleet
    slots = [fleet.table.find(record.worker_id) for record in fleet.records.values() if record.role is Role.DECODE]

    def is_known(prompt: Sequence[int]) -> bool:
        held = held_prefixes(fleet.index, fleet.table, PromptHashes(prompt)).device
        block_size = next(iter(fleet.hash_keys())).block_size
        return bool(max(held[slot] for slot in slots) >= len(prompt) // block_size * block_size)

    async with asyncio.timeout(PATIENCE_S):
        while not all(is_known(prompt) for prompt in prompts):  # noqa: ASYNC110 - an index tells nobody
            await asyncio.sleep(0.01)


async def test_a_prompt_is_bound_late_when_the_decode_pool_is_full(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with mode_gateway(cluster, redis.url, "late") as late:
        async with full_decode_pool(late.gateway.fleet, _MAX_REQUESTS) as places:
            streams = [Stream(late.client, prompt) for prompt in prompts]
            await until_begun(streams)
            places.check()
            assert not any(stream.task.done() for stream in streams), "nobody has room to decode them"
        results = [await stream.task for stream in streams]
    assert [ids_of(result) for result in results] == expected
    modes_of(results)
    assert {result.summary.placement.binding for result in results} == {"late"}
    await cluster.until_status(is_idle)


async def test_a_prompt_that_nobody_takes_over_stays_where_it_is(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with (
        mode_gateway(cluster, redis.url, "kept") as kept,
        full_decode_pool(kept.gateway.fleet, _MAX_REQUESTS) as places,
    ):
        results = await asyncio.gather(*(greedy(kept.client, prompt) for prompt in prompts[:3]))
        places.check()
    assert [ids_of(result) for result in results] == expected[:3]
    assert modes_of(results) == {"colocated"}
    assert {result.summary.placement.mode_reason for result in results} == {"no_decode_pool"}
    await cluster.until_status(is_idle)


async def test_a_session_stays_with_its_workers(cluster: ClusterProcess, redis: RedisProcess) -> None:
    """It is worth some seconds, no more: it decides when they outweigh what the workers differ in."""
    async with mode_gateway(cluster, redis.url, "sticky") as sticky:
        for session in ("one", "two", "three"):
            places = []
            for turn in range(4):  # too short for a block of a prefix cache: only the session draws them together
                result = await sticky.client.generate_text(
                    [500 + turn, 501], temperature=0.0, max_tokens=4, service=Service(session_id=session)
                )
                places.append((result.summary.placement.prefill_worker, result.summary.placement.decode_worker))
            assert len(set(places)) == 1, places


async def test_who_leaves_the_workers_of_a_session_pays_for_it(cluster: ClusterProcess) -> None:
    price_s = RoutingConfig().affinity_credit_s
    last = ("", "")  # nobody served it yet
    async with Client(cluster.address) as client:
        for turn in range(4):
            result = await client.generate_text(
                [500 + turn, 501], temperature=0.0, max_tokens=4, service=Service(session_id="priced")
            )
            decisions = await client.explain(result.summary.request_id)
            assert decisions
            for decision in decisions:
                assert decision.winner == decision.candidates[0]
                for candidate in decision.candidates:
                    chosen = (candidate.prefill_worker, candidate.decode_worker)
                    num_left = sum(old != new for old, new in zip(last, chosen, strict=True) if old and new)
                    assert candidate.terms_s["affinity_s"] == pytest.approx(num_left * price_s), (last, candidate)
            last = (result.summary.placement.prefill_worker, result.summary.placement.decode_worker)


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
    async with (
        mode_gateway(cluster, redis.url, "early") as early,
        full_decode_pool(early.gateway.fleet, _MAX_REQUESTS) as places,
    ):

        async def one(service_class: str, priority: int) -> None:
            service = Service(service_class, priority)
            pieces = early.client.generate([700, 701], temperature=0.0, max_tokens=24, ignore_eos=True, service=service)
            async for piece in pieces:
                if piece.tokens and piece.tokens[0].index == 0:
                    order.append((service_class, priority))

        waiting = []
        for service_class, priority in asked:
            waiting.append(asyncio.create_task(one(service_class, priority)))
            async with asyncio.timeout(PATIENCE_S):
                while early.gateway.dispatcher.num_queued < len(waiting):  # noqa: ASYNC110 - a queue tells nobody
                    await asyncio.sleep(0.01)
        places.check()
        assert order == [], "there is no room yet"
        await places.free_one()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*waiting)
    assert order[0][0] == "interactive", order  # the next ones ask at the same time, and who is accepted is chance
    assert sorted(order) == sorted(asked)
    await cluster.until_status(is_idle)


async def test_a_whole_decode_pool_dies_and_comes_back(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Who was decoding there is told; prefill workers serve meanwhile, also with one of them gone."""
    before = dict(cluster.epochs)
    async with Client(cluster.address, max_retries=0) as client, mode_gateway(cluster, redis.url, "early") as early:
        load = Load(early.client)
        await load.start([[17 + n, *range(100, 110)] for n in range(2 * _MAX_REQUESTS)])
        with cluster.nobody_restarted():
            await lose_pool(cluster, "decode")
            for error in await load.failed_within(2 * _MAX_REQUESTS, PROMISE_S):
                assert error.grpc_code == "UNAVAILABLE", error
            await serve_without_decode_pool(client, prompts, expected)
            victim = await lose_one_of_two(cluster, client, prompts)
        await restarted(cluster, "decode-0", "decode-1", victim, since=before)
        await serve_with_both_pools(cluster, client, prompts, expected)


async def test_prompts_whose_kv_waits_outlive_the_decode_pool(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """They go on at the new decode workers. Only those fail whose own prefill worker dies."""
    before = dict(cluster.epochs)
    async with Client(cluster.address, max_retries=0) as client, mode_gateway(cluster, redis.url, "late") as late:
        fleet, dispatcher = late.gateway.fleet, late.gateway.dispatcher
        async with full_decode_pool(fleet, _MAX_REQUESTS) as places:
            held = [Stream(late.client, prompt) for prompt in prompts]
            await until_begun(held)
            places.check()
            with cluster.nobody_restarted():
                await lose_pool(cluster, "decode")
                async with asyncio.timeout(PATIENCE_S):
                    while fleet.count_live()[Role.DECODE]:
                        await fleet.changed.next().wait()
                await serve_without_decode_pool(client, prompts, expected)
                assert not any(stream.task.done() for stream in held), "their KV waits for a decode worker"
                num_held = {name: dispatcher.num_on_worker(WorkerId(name)) for name in ("prefill-0", "prefill-1")}
                assert sum(num_held.values()) == len(held)
                victim = await lose_one_of_two(cluster, client, prompts)
        await restarted(cluster, "decode-0", "decode-1", victim, since=before)
        outcomes = await asyncio.gather(*(stream.task for stream in held), return_exceptions=True)
        for outcome, tokens in zip(outcomes, expected, strict=True):
            if isinstance(outcome, Generation):
                assert ids_of(outcome) == tokens
                assert outcome.summary.placement.binding == "late"
            else:
                assert isinstance(outcome, ServingError), outcome
                assert outcome.grpc_code == "UNAVAILABLE", outcome
        assert sum(not isinstance(outcome, Generation) for outcome in outcomes) == num_held[victim]
        await serve_with_both_pools(cluster, client, prompts, expected)


async def test_a_whole_prefill_pool_dies_and_comes_back(
    cluster: ClusterProcess, redis: RedisProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Decode workers serve alone meanwhile, and those who decode there notice nothing."""
    before = dict(cluster.epochs)
    async with Client(cluster.address, max_retries=0) as client, mode_gateway(cluster, redis.url, "early") as early:
        on_decode = Load(early.client)
        await on_decode.start(prompts[:4])
        with cluster.nobody_restarted():
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
        await serve_with_both_pools(cluster, client, prompts, expected)


async def serve_without_decode_pool(
    client: Client, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> None:
    results = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
    assert [ids_of(result) for result in results] == expected
    assert modes_of(results) == {"colocated"}
    assert {result.summary.placement.mode_reason for result in results} == {"no_decode_pool"}


async def serve_with_both_pools(
    cluster: ClusterProcess, client: Client, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> None:
    """Everybody is back, and in the end every block."""
    await cluster.until_status(is_idle)
    results = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
    assert [ids_of(result) for result in results] == expected
    modes_of(results)
    assert not {result.summary.placement.mode_reason for result in results} & {"no_prefill_pool", "no_decode_pool"}
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
