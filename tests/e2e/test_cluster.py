"""One real cluster, Ray and all: identity with transformers, seeds, examples, and kill -9 of every kind of process.

The hand-over between the pools is its subject, so no other mode may be taken; `test_modes` has the others. The tests
share the cluster; each leaves it whole. Failures are waited for with deadlines, never slept for.
"""

import asyncio
import importlib
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import psutil
import pytest
import pytest_asyncio

from core.ids import RequestId
from core.request import GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from tandem_client import Client, Generation, Sampling, ServingError
from tests.e2e.cluster_process import ROOT, TINY, ClusterProcess, running_cluster, tandem, tiny_config
from tests.e2e.generations import (
    PROMISE_S,
    Load,
    assert_serves,
    greedy,
    ids_of,
    is_idle,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(240)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterProcess]:
    config = tiny_config("e2e", router={"port": 0, "routing": {"modes": ["remote_prefill"]}})
    async with running_cluster(tmp_path_factory.mktemp("run"), config) as cluster:
        yield cluster


async def test_greedy_equals_transformers_one_by_one_and_cold(
    cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with Client(cluster.address) as client:
        results = [await greedy(client, prompt) for prompt in prompts]
    assert [ids_of(result) for result in results] == expected
    first = results[-1].summary
    assert first.usage.prompt_tokens > 64, "not computed in chunks"
    assert first.placement.kv_bytes > 0
    pids = {worker.worker_id: worker.pid for worker in (await cluster.status()).workers}
    assert len(set(pids.values())) == 4
    for result in results:
        placement = result.summary.placement
        assert pids[placement.prefill_worker] != pids[placement.decode_worker]
        assert (placement.mode, placement.mode_reason, placement.binding) == (
            "remote_prefill",
            "only_possible",
            "early",
        )


async def test_greedy_equals_transformers_sixteen_at_once_and_cached(
    cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with Client(cluster.address) as client:
        for _ in range(2):
            results = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
            assert [ids_of(result) for result in results] == expected
    assert sum(result.summary.usage.cached_tokens for result in results) > 0, "no prefix hit on the prefill side"
    assert sum(result.summary.placement.kv_tokens_held for result in results) > 0, "no KV was held already"
    await cluster.until_status(is_idle)


async def test_seeded_sampling_equals_a_single_engine(cluster: ClusterProcess, prompts: list[list[int]]) -> None:
    kinds = [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "seed": 2**63 + 11},
        {"temperature": 0.7, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": 0},
    ]
    wanted = [(prompt, kind) for prompt in prompts[::5] for kind in kinds]
    async with Client(cluster.address) as client:
        results = await asyncio.gather(
            *(client.generate_text(prompt, **cast(Sampling, kind | {"max_tokens": 24})) for prompt, kind in wanted)
        )
    engine = Engine.load(ModelConfig(path=TINY, dtype="float32"), EngineConfig(num_blocks=64, num_threads=1))
    for (prompt, kind), result in zip(wanted, results, strict=True):
        params = SamplingParams(max_tokens=24, **cast(dict[str, Any], kind))
        engine.add(GenerateRequest(RequestId("r"), tuple(prompt), params))
        alone: list[int] = []
        while engine.has_work():
            alone += [token.token_id for output in engine.step() for token in output.tokens]
        assert ids_of(result) == alone


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("[a-z]*.py")))
async def test_examples(cluster: ClusterProcess, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"examples.{name}")
    async with asyncio.timeout(30):
        await module.main(cluster.address)
    assert capsys.readouterr().out.strip()


async def test_commands_find_the_cluster(cluster: ClusterProcess) -> None:
    code, out, err = await tandem(cluster.folder, "status", "--json")
    assert (code, err) == (0, [])
    assert len(json.loads("\n".join(out))["workers"]) == 4
    code, out, _ = await tandem(cluster.folder, "generate", "Return a list of", "-t", "0", "-n", "8")
    assert code == 0
    async with Client(cluster.address) as client:
        text = (await client.generate_text("Return a list of", temperature=0.0, max_tokens=8)).text
    assert "\n".join(out) == text
    code, out, err = await tandem(cluster.folder, "up", "-f", str(cluster.folder / "cluster.yaml"))
    assert code == 1
    assert err == ["error: cluster 'e2e' is up already; see `tandem status`, `tandem down`"]


async def test_kill_a_decode_worker(
    cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with Client(cluster.address, max_retries=0) as client:
        load = Load(client)
        await load.start(prompts[:8])
        decoding = [worker for worker in (await cluster.status()).workers if worker.role == "decode"]
        victim = max(decoding, key=lambda worker: worker.in_flight)
        assert victim.in_flight > 0
        cluster.kill(victim.worker_id)
        for error in await load.failed_within(victim.in_flight, PROMISE_S):
            assert error.grpc_code == "UNAVAILABLE", error
        await load.leave()
        assert load.failures.empty(), "more requests failed than the dead worker held"
    await cluster.until_restarted(victim.worker_id)
    await assert_serves(cluster, prompts, expected)


async def test_kill_a_prefill_worker(
    cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Requests that have no token yet are tried elsewhere; the others are past it. So none needs to fail."""
    async with Client(cluster.address, max_retries=0) as client:
        fresh = [[(n * 7919 + k * 31) % 3000 + 10 for k in range(400)] for n in range(12)]
        running = [asyncio.create_task(greedy(client, prompt)) for prompt in fresh]
        await cluster.until_status(
            lambda status: any(w.worker_id == "prefill-0" and w.in_flight for w in status.workers)
        )
        cluster.kill("prefill-0")
        async with asyncio.timeout(PROMISE_S):
            await cluster.until_status(
                lambda status: not any(w.worker_id == "prefill-0" and w.in_flight for w in status.workers)
            )
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*running, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Generation):
            ids_of(outcome)
        else:
            assert isinstance(outcome, ServingError), outcome
            assert outcome.grpc_code == "UNAVAILABLE", outcome
    assert any(isinstance(outcome, Generation) for outcome in outcomes)
    await cluster.until_restarted("prefill-0")
    await assert_serves(cluster, prompts, expected)


async def test_kill_the_gateway(cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]) -> None:
    async with Client(cluster.address, max_retries=0) as client:
        load = Load(client)
        await load.start(prompts[:8])
        cluster.kill("gateway-0")
        for error in await load.failed_within(8, PROMISE_S):
            assert error.grpc_code == "UNAVAILABLE", error
        await load.leave()
    await cluster.until_restarted("gateway-0")
    await cluster.until_status(is_idle)  # on the same address, and the orphaned requests were freed
    await assert_serves(cluster, prompts, expected)


async def test_kill_redis(cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]) -> None:
    async with Client(cluster.address, max_retries=0) as client:
        load = Load(client)
        await load.start(prompts[:4])
        cluster.kill("redis")
        results = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
        assert [ids_of(result) for result in results] == expected
        assert load.failures.empty(), "Redis is not on the token path"
        await load.leave()
    await cluster.until_restarted("redis")
    await cluster.until_status(lambda status: status.store_staleness_s < 1.0 and is_idle(status))
    await assert_serves(cluster, prompts, expected)


async def test_processes_are_those_that_were_asked_for(cluster: ClusterProcess) -> None:
    """After all the deaths: one process per service, and each under the newest epoch."""
    status = await cluster.until_status(is_idle)
    for worker in status.workers:
        assert worker.epoch == cluster.epochs[worker.worker_id]
        assert worker.pid == cluster.pids[worker.worker_id]
        assert psutil.pid_exists(worker.pid)
