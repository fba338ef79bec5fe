"""Hundreds of streams over both doors of one gateway, of which a third is left at random moments: what the others read
is right token by token, and nothing of any is left: no task, socket, request, block, reservation, quota, stored stream.

Generation goes on as the clients read, so that those who leave do so in the middle of something.
"""

import asyncio
import gc
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from core.clock import MonotonicClock
from core.rpc import connect
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.service import Gateway
from tests.fake_model import greedy, run_to_end, token_ids
from tests.fakes.cluster import FakeCluster, fake_cluster
from tests.worker_pair import Pair, request, worker_pair

pytestmark = pytest.mark.slow

NUM_STREAMS = 500
NUM_TOKENS = 12
NUM_CHANNELS = 20
NUM_REAL_STREAMS = 36
LIMIT_S = 30.0
TENANT = "crowd"
TINY = Path(__file__).parents[2] / "models" / "tiny"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client does. `leaves_after`: so many tokens; None: it stays."""

    number: int
    leaves_after: int | None

    @property
    def is_http(self) -> bool:
        return self.number % 2 == 0

    @property
    def resume_window_s(self) -> float:
        return 0.2 if self.number % 10 < 2 else 0.0

    @property
    def text(self) -> str:
        """What the fake model generates for a seed."""
        return "".join(chr(ord("a") + (self.number + index) % 26) for index in range(NUM_TOKENS))


def plans(count: int, num_tokens: int) -> list[Plan]:
    rng = random.Random(7)
    leaving = set(rng.sample(range(count), count // 3))
    return [Plan(number, rng.randrange(num_tokens) if number in leaving else None) for number in range(count)]


async def over_http(address: str, plan: Plan, body: dict[str, Any], on_choice: Callable[[dict[str, Any]], int]) -> None:
    """Read a completion as it comes; leave by cutting the connection. `on_choice` returns how many tokens it has."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        content = json.dumps({"stream": True, "max_tokens": NUM_TOKENS, **body}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"x-tandem-tenant: {TENANT}\r\nx-resume-window: {plan.resume_window_s}\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        num_read = 0
        while plan.leaves_after is None or num_read < plan.leaves_after:
            await reader.readuntil(b"data: ")
            event = (await reader.readuntil(b"\n\n")).strip()
            if event == b"[DONE]":
                return
            for choice in json.loads(event)["choices"]:
                num_read += on_choice(choice)
    finally:
        writer.transport.abort()


async def over_grpc(
    channel: grpc.aio.Channel, plan: Plan, wanted: pb.GenerateRequest, on_tokens: Callable[[pb.TokenDelta], object]
) -> None:
    """Read a generation as it comes; leave by cancelling the call."""
    call = inference_pb2_grpc.InferenceStub(channel).Generate(wanted)
    num_read = 0
    async for response in call:
        if response.HasField("delta"):
            on_tokens(response.delta)
            num_read += len(response.delta.tokens)
        if plan.leaves_after is not None and num_read >= plan.leaves_after:
            call.cancel()
            return


@asynccontextmanager
async def nothing_left(gateway: Gateway) -> AsyncIterator[None]:
    """Whatever is done within leaves no task, open file, request, quota or stored stream behind. Clients must have
    closed their ends."""

    def held() -> dict[str, int]:
        return {
            "tasks": len(asyncio.all_tasks()),
            "files": len(os.listdir("/proc/self/fd")),
            "requests": gateway.dispatcher.num_active + gateway.dispatcher.num_queued,
            "quotas": gateway.quotas.num_held(TENANT),
            "stored streams": gateway.resumables.num_streams,
            "stored bytes": gateway.resumables.num_bytes,
        }

    gc.collect()
    before = held()
    yield
    gc.collect()  # a closed channel of a client keeps its socket until then
    after = held()
    try:
        async with asyncio.timeout(LIMIT_S):
            # Sockets and windows end in their own time, and tell nobody.
            while any(after[name] > before[name] for name in before):
                await asyncio.sleep(0.02)
                after = held()
    except TimeoutError:
        pytest.fail(f"before: {before}, after: {after}")


async def test_five_hundred_streams_of_which_a_third_is_left(checkpoint: Path) -> None:
    tenants = {TENANT: {"max_concurrent_requests": NUM_STREAMS, "tokens_per_minute": 10**9}}
    async with fake_cluster(
        checkpoint, num_prefills=2, num_decodes=2, tenants=tenants, http={"port": 0}, request_timeout_s=LIMIT_S
    ) as cluster:
        await one_of_each(cluster)
        async with nothing_left(cluster.gateway):
            texts, failures = await crowd(cluster)
        assert failures == []
        for plan in plans(NUM_STREAMS, NUM_TOKENS):
            if plan.leaves_after is None:
                assert texts[plan.number] == plan.text, plan
            else:
                assert plan.text.startswith(texts[plan.number]), plan
                assert len(texts[plan.number]) >= plan.leaves_after
        async with asyncio.timeout(LIMIT_S):
            for worker in cluster.workers:
                await worker.wait_until(lambda worker=worker: not worker.held and not worker.queued)  # type: ignore[misc]
        assert cluster.holds_nothing()
        credit = [cluster.gateway.fleet.credit.of(worker.worker_id) for worker in cluster.workers]
        assert [one.num_requests for one in credit] == [0] * 4
        await one_of_each(cluster)


async def one_of_each(cluster: FakeCluster) -> None:
    """What is made once, at the first request, is no leak."""
    for plan in (Plan(2, None), Plan(3, None)):
        texts, failures = {plan.number: ""}, list[str]()
        async with connect(cluster.address) as channel:
            await client(cluster, channel, plan, texts, failures)
        assert (texts, failures) == ({plan.number: plan.text}, [])


async def crowd(cluster: FakeCluster) -> tuple[dict[int, str], list[str]]:
    """All at once. Return what each client read, and how those who stayed failed."""
    permits = asyncio.Semaphore(NUM_STREAMS)
    for worker in cluster.decodes:
        worker.steps_allowed = permits
    todo = plans(NUM_STREAMS, NUM_TOKENS)
    texts, failures = {plan.number: "" for plan in todo}, list[str]()

    async def one(plan: Plan, channel: grpc.aio.Channel) -> None:
        try:
            await client(cluster, channel, plan, texts, failures, on_read=permits.release)
        finally:
            for _ in range(NUM_TOKENS):  # what was on its way to it has used up some
                permits.release()

    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(cluster.address)) for _ in range(NUM_CHANNELS)]
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(one(plan, channels[plan.number % NUM_CHANNELS]) for plan in todo))
    return texts, failures


async def client(
    cluster: FakeCluster,
    channel: grpc.aio.Channel,
    plan: Plan,
    texts: dict[int, str],
    failures: list[str],
    on_read: Callable[[], None] = lambda: None,
) -> None:
    def note(text: str) -> int:
        texts[plan.number] += text
        for _ in text:
            on_read()
        return len(text)

    try:
        if plan.is_http:
            body = {"prompt": f"p{plan.number}", "seed": plan.number, "temperature": 1}
            await over_http(cluster.gateway.http_address, plan, body, lambda choice: note(choice["text"]))
        else:
            wanted = pb.GenerateRequest(
                text=f"p{plan.number}",
                sampling=pb.SamplingParams(temperature=1.0, seed=plan.number, max_tokens=NUM_TOKENS),
                terms=pb.RequestTerms(tenant=TENANT, resume_window_s=plan.resume_window_s),
            )
            await over_grpc(channel, plan, wanted, lambda delta: note(delta.text))
    except (grpc.aio.AioRpcError, OSError, asyncio.IncompleteReadError) as error:
        failures.append(f"{plan}: {error}")


@asynccontextmanager
async def gateway_before(pair: Pair) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway that has both workers, and its address."""
    config = RouterConfig.model_validate(
        {"model_path": TINY, "port": 0, "http": {"port": 0}, "mirror": {"poll_interval_s": 0.02}}
    )
    gateway = Gateway(config, "test", pair.store, MonotonicClock())
    address = await gateway.start()
    try:
        async with asyncio.timeout(LIMIT_S):
            while sum(gateway.fleet.count_live().values()) < 2:
                await gateway.fleet.changed.next().wait()
        yield gateway, address
    finally:
        await gateway.stop(0.0)


async def test_real_workers_keep_no_block_of_streams_that_were_left() -> None:
    model = ModelConfig(path=TINY, dtype="float32")
    engine = EngineConfig(num_blocks=256, max_batch_tokens=128, num_threads=1, layer_group_size=2)
    todo = plans(NUM_REAL_STREAMS, NUM_TOKENS)
    prompts = [tuple((37 * at + plan.number) % 500 + 3 for at in range(20)) for plan in todo]
    alone = Engine.load(model, engine)
    for number, prompt in enumerate(prompts):
        alone.add(request(str(number), prompt, greedy(NUM_TOKENS, ignore_eos=True)))
    right = {int(name): token_ids(outputs) for name, outputs in run_to_end(alone).items()}
    found: list[list[int]] = [[] for _ in todo]
    async with (
        worker_pair(model=model, engine=engine, max_queued_tokens=10_000) as pair,
        gateway_before(pair) as (gateway, address),
    ):

        async def one(plan: Plan, channel: grpc.aio.Channel) -> None:
            mine = found[plan.number]

            def of_choice(choice: dict[str, Any]) -> int:
                new = choice.get("token_ids", [])  # the first event tells of the prompt
                mine.extend(new)
                return len(new)

            def of_delta(delta: pb.TokenDelta) -> None:
                assert [token.index for token in delta.tokens] == list(range(len(mine), len(mine) + len(delta.tokens)))
                mine.extend(token.token_id for token in delta.tokens)

            prompt = prompts[plan.number]
            if plan.is_http:
                body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
                await over_http(gateway.http_address, plan, body, of_choice)
            else:
                sampling = pb.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
                wanted = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
                await over_grpc(channel, plan, wanted, of_delta)

        async with connect(address) as channel:  # the way from worker to worker is opened by the first, and stays
            await asyncio.gather(*(one(Plan(number, None), channel) for number in range(4)))
        assert found[:4] == [right[number] for number in range(4)]
        for tokens in found:
            tokens.clear()
        async with nothing_left(gateway), connect(address) as channel:
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*(one(plan, channel) for plan in todo))
        await pair.until_idle()
    for plan in todo:
        if plan.leaves_after is None:
            assert found[plan.number] == right[plan.number], plan
        else:
            assert found[plan.number] == right[plan.number][: len(found[plan.number])], plan
