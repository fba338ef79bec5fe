"""Requests that one worker computes and generates alone, of either role: the tokens are those of one engine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from core.request import FinishReason, SamplingParams
from tests.fake_model import greedy, reference_tokens
from tests.worker_pair import Pair, request, worker_pair
from tests.worker_side import Side
from tests.worker_stream import WorkerStream

LONG = request("long", 30, greedy(30))
SIDES = ["prefill", "decode"]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with worker_pair() as pair:
        yield pair


async def submit(pair: Pair, side: str, *args: object, **terms: object) -> None:
    if side == "prefill":
        await pair.submit_prefill(*args, hand_off=False, **terms)  # type: ignore[arg-type]
    else:
        await pair.submit_decode(*args, generate=True, **terms)  # type: ignore[arg-type]


def stream_of(pair: Pair, side: str) -> WorkerStream:
    return pair.to_prefill if side == "prefill" else pair.to_decode


def side_of(pair: Pair, side: str) -> Side:
    return pair.prefill_side if side == "prefill" else pair.decode_side


@pytest.mark.parametrize("side", SIDES)
async def test_a_batch_comes_out_as_of_one_engine_and_its_reports_are_in_order(pair: Pair, side: str) -> None:
    asked = [
        request("greedy", 19),
        request("seeded", 13, SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=9)),
        request("long", 40, greedy(20)),
        request("one", 9, greedy(1)),
        request("penalised", 11, SamplingParams(temperature=0.5, seed=1, frequency_penalty=1.0, max_tokens=8)),
    ]
    stream = stream_of(pair, side)
    for one in asked:
        await submit(pair, side, one)
    for one in asked:
        await stream.until_finished(one.request_id)
    await pair.until_idle()
    assert [pair.token_ids(one.request_id) for one in asked] == [reference_tokens(one) for one in asked]
    kinds = stream.kinds("seeded")
    assert kinds[:3] == ["accepted", "computed", "outputs"]
    assert set(kinds[3:]) == {"outputs"}
    assert stream.kinds("one") == ["accepted", "computed", "outputs"]
    finish = stream.outputs("greedy")[-1].finish
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH


@pytest.mark.parametrize("side", SIDES)
async def test_what_the_prefix_cache_has_is_not_computed_again(pair: Pair, side: str) -> None:
    stream = stream_of(pair, side)
    first = request("a", 20)
    second = request("b", (*first.prompt_token_ids, 5, 6, 7), SamplingParams(seed=4, max_tokens=9))
    await submit(pair, side, first)
    await stream.until_finished("a")
    await submit(pair, side, second)
    await stream.until_finished("b")
    assert pair.token_ids("b") == reference_tokens(second)
    assert (await stream.answer("computed", "a")).cached_tokens == 0
    assert (await stream.answer("computed", "b")).cached_tokens == 20
    if side == "decode":  # its engine was asked before it accepted
        assert (await stream.answer("accepted", "b")).cached_tokens == 20


async def test_a_decode_worker_goes_on_from_a_prefix_that_landed(pair: Pair) -> None:
    first = request("a", 20)
    second = request("b", (*first.prompt_token_ids, 5, 6, 7))
    await pair.generate(first)
    await pair.submit_decode(second, generate=True)
    await pair.to_decode.until_finished("b")
    assert pair.token_ids("b") == reference_tokens(second)
    assert (await pair.to_decode.answer("computed", "b")).cached_tokens == 20


async def test_a_decode_worker_lets_running_requests_and_its_own_prompts_share_the_batch(pair: Pair) -> None:
    asked = [request("remote", 20, greedy(20)), request("local", 30, greedy(9))]
    await pair.submit(asked[0])
    await pair.submit_decode(asked[1], generate=True)
    await asyncio.gather(*(pair.to_decode.until_finished(one.request_id) for one in asked))
    assert [pair.token_ids(one.request_id) for one in asked] == [reference_tokens(one) for one in asked]


async def to_accepted(pair: Pair, side: str) -> None:
    """The engine's thread is held by another request; this one waits."""
    side_of(pair, side).computing.close()
    await submit(pair, side, request("other", 10))
    await side_of(pair, side).computing.until_reached()
    await submit(pair, side, LONG)
    if side == "prefill":  # a decode worker asks its engine first
        await stream_of(pair, side).answer("accepted", "long")


async def to_computing(pair: Pair, side: str) -> None:
    side_of(pair, side).computing.close()
    await submit(pair, side, LONG)
    await side_of(pair, side).computing.until_reached()


async def to_generating(pair: Pair, side: str) -> None:
    side_of(pair, side).computing.close(after=6)  # four steps for the prompt
    await submit(pair, side, LONG)
    await stream_of(pair, side).until_output("long")
    await side_of(pair, side).computing.until_reached()


Reach = Callable[[Pair, str], Awaitable[None]]
STATES = [to_accepted, to_computing, to_generating]


@pytest.mark.parametrize("reach", STATES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("end", ["abort", "cut", "close"])
async def test_whatever_ends_it_early_frees_every_block(pair: Pair, side: str, reach: Reach, end: str) -> None:
    await reach(pair, side)
    stream, worker = stream_of(pair, side), pair.prefill if side == "prefill" else pair.decode
    if end == "abort":
        await stream.abort("long")
        await stream.abort("other")
    elif end == "cut":
        await stream.cut()
    else:
        stopping = asyncio.create_task(worker.stop(10.0))
        await asyncio.sleep(0)
    side_of(pair, side).computing.open()
    if end == "close":
        await stopping  # whether every block is free is asserted by the fixture
        await stream.until_over()
    elif end == "cut":
        await pair.until_idle()
    else:
        again = request("again", 12)
        await submit(pair, side, again)  # taken after the aborts
        await stream.until_finished("again")
        await pair.until_idle()
        assert "failed" not in stream.kinds("long")


@pytest.mark.parametrize("side", SIDES)
async def test_a_step_that_fails_loses_it_and_not_the_worker(pair: Pair, side: str) -> None:
    await to_generating(pair, side)
    runner = side_of(pair, side).runner
    assert runner is not None
    runner.fail_next = RuntimeError("bad luck")
    side_of(pair, side).computing.open()
    failed = await stream_of(pair, side).answer("failed", "long")
    assert (failed.grpc_code, "bad luck" in failed.detail) == ("UNAVAILABLE", True)
    await pair.until_idle()


@pytest.mark.parametrize("side", SIDES)
async def test_what_no_worker_can_serve_is_an_invalid_request(pair: Pair, side: str) -> None:
    await submit(pair, side, request("a", 5, greedy(6, stop=("x",))))
    assert (await stream_of(pair, side).answer("failed", "a")).grpc_code == "INVALID_ARGUMENT"
    await pair.until_idle()


async def test_a_request_that_only_a_larger_pool_holds_is_told_so() -> None:
    async with worker_pair(num_blocks=8) as pair:
        for side in SIDES:
            await submit(pair, side, request("a", 20, greedy(40)))
            assert (await stream_of(pair, side).answer("failed", "a")).grpc_code == "OUT_OF_RANGE"


async def test_a_prompt_that_is_not_computed_in_time_is_lost() -> None:
    async with worker_pair(compute_timeout_s=1e-6) as pair:
        for side in SIDES:
            side_of(pair, side).computing.close()
            await submit(pair, side, LONG)
            await stream_of(pair, side).answer("accepted", "long")  # and the deadline has come, before a step can end
            side_of(pair, side).computing.open()
            assert (await stream_of(pair, side).answer("failed", "long")).grpc_code == "UNAVAILABLE"
            await pair.until_idle()
