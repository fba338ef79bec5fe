"""Requests whose decode worker is named while the prefill worker computes, or later, or never: no token differs.

Every test ends with every block of both engines free or cached (`worker_pair`).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from core.request import SamplingParams
from protos import codec, worker_pb2
from tests.fake_model import greedy, reference_tokens
from tests.worker_pair import D, Pair, request, worker_pair
from tests.worker_stream import EPOCH, prefill_stream

LONG = request("long", 30, greedy(12))
SEEDED = request("seeded", 29, SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=14, ignore_eos=True))
SHARED = request("shared", (*LONG.prompt_token_ids[:20], 4, 4, 4), greedy(9))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with worker_pair() as pair:
        yield pair


async def to_waiting(pair: Pair, name: str) -> None:
    """Accepted; another request's step is running."""
    pair.prefill_side.computing.close()
    await pair.submit_prefill(request("other", 3, greedy(1)), hand_off=False)
    await pair.prefill_side.computing.until_reached()
    await pair.submit_prefill(REQUESTS[name], bind_later=True)
    await pair.to_prefill.answer("accepted", name)


async def to_computing(pair: Pair, name: str) -> None:
    """In the middle of its prompt."""
    pair.prefill_side.computing.close()
    await pair.submit_prefill(REQUESTS[name], bind_later=True)
    await pair.to_prefill.answer("accepted", name)
    await pair.prefill_side.computing.until_reached()


async def to_leased(pair: Pair, name: str) -> None:
    """The first token is out, and nobody is bound."""
    await pair.submit_prefill(REQUESTS[name], bind_later=True)
    await pair.to_prefill.until_output(name)


REQUESTS = {str(one.request_id): one for one in (LONG, SEEDED, SHARED)}
STATES = [to_waiting, to_computing, to_leased]
Reach = Callable[[Pair, str], Awaitable[None]]


async def warm(pair: Pair) -> None:
    """Both workers hold the prefix that one of the requests shares."""
    await pair.generate(request("warm", LONG.prompt_token_ids[:20]))


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("reach", STATES)
async def test_a_request_that_is_bound_late_is_handed_over_whole(pair: Pair, reach: Reach, name: str) -> None:
    await warm(pair)
    await reach(pair, name)
    await pair.bind(REQUESTS[name])
    pair.prefill_side.computing.open()
    await pair.to_decode.until_finished(name)
    await pair.to_prefill.answer("handed_over", name)
    assert pair.token_ids(name) == reference_tokens(REQUESTS[name])
    landed = await pair.to_decode.answer("landed", name)
    held = 0 if name == "seeded" else 20
    assert (landed.kv_tokens_held, landed.kv_tokens_sent) == (held, REQUESTS[name].num_prompt_tokens - held)
    assert pair.to_prefill.kinds(name) == ["accepted", "computed", "outputs", "handed_over"]
    await pair.until_idle()


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("reach", STATES)
async def test_a_request_that_is_kept_is_generated_here_to_its_end(pair: Pair, reach: Reach, name: str) -> None:
    await warm(pair)
    await reach(pair, name)
    await pair.keep(name)
    pair.prefill_side.computing.open()
    await pair.to_prefill.until_finished(name)
    assert pair.token_ids(name) == reference_tokens(REQUESTS[name])
    kinds = pair.to_prefill.kinds(name)
    assert kinds[:3] == ["accepted", "computed", "outputs"]
    assert set(kinds[3:]) == {"outputs"}
    await pair.until_idle()


async def test_many_at_once_bound_kept_and_early_are_all_right(pair: Pair) -> None:
    asked = [request(f"r{'x' * at}", 9 + 5 * at, greedy(8)) for at in range(6)]
    for at, one in enumerate(asked):
        if at % 3 == 0:
            await pair.submit(one)
        else:
            await pair.submit_prefill(one, bind_later=True)
    for at, one in enumerate(asked):
        if at % 3 == 1:
            await pair.bind(one)
        elif at % 3 == 2:
            await pair.keep(one.request_id)
    for at, one in enumerate(asked):
        await (pair.to_prefill if at % 3 == 2 else pair.to_decode).until_finished(one.request_id)
    assert [pair.token_ids(one.request_id) for one in asked] == [reference_tokens(one) for one in asked]


async def test_a_first_token_that_is_the_last_needs_no_binding(pair: Pair) -> None:
    stop_token = reference_tokens(request("stops", 10))[0]
    await pair.submit_prefill(request("stops", 10, greedy(6, stop_token_ids=(stop_token,))), bind_later=True)
    await pair.to_prefill.until_finished("stops")
    await pair.keep("stops")  # late
    await pair.to_prefill.until_output("stops")
    await pair.until_idle()
    await pair.until_prefill_heard()  # nothing that was said before is still on its way
    assert pair.to_prefill.kinds("stops") == ["accepted", "computed", "outputs"]


async def test_only_the_first_word_counts(pair: Pair) -> None:
    await to_leased(pair, "long")
    await pair.bind(LONG)
    await pair.keep("long")
    await pair.to_decode.until_finished("long")
    await pair.to_prefill.answer("handed_over", "long")
    await to_leased(pair, "seeded")
    await pair.keep("seeded")
    await pair.keep("seeded")
    await pair.to_prefill.until_finished("seeded")
    for name in ("long", "seeded"):
        assert pair.token_ids(name) == reference_tokens(REQUESTS[name])


async def test_a_gateway_cannot_bind_what_came_over_another_stream(pair: Pair) -> None:
    await to_leased(pair, "long")
    async with prefill_stream(pair.prefill_address) as other:
        await other.send(bind=worker_pb2.PrefillBind(request_id="long"))
        await other.send(submit=worker_pb2.PrefillSubmit(request=codec.request_to_wire(LONG)))
        assert (await other.answer("rejected", "long")).reason == "duplicate"  # it is leased still
    await pair.bind(LONG)
    await pair.to_decode.until_finished("long")
    assert pair.token_ids("long") == reference_tokens(LONG)


async def test_a_late_binding_of_nothing_breaks_the_contract(pair: Pair) -> None:
    submit = worker_pb2.PrefillSubmit(request=codec.request_to_wire(LONG), bind_later=True)
    await pair.to_prefill.send(submit=submit)
    error = await pair.to_prefill.until_over()
    assert error is not None
    assert "bound later" in str(error.details())


async def test_a_lease_that_nobody_is_bound_to_lapses() -> None:
    async with worker_pair(bind_timeout_s=0.05) as pair:
        await to_leased(pair, "long")
        failed = await pair.to_prefill.answer("failed", "long")
        assert (failed.grpc_code, failed.reason) == ("UNAVAILABLE", "lease_expired")
        await pair.bind(LONG)  # too late: nobody is there
        await pair.until_prefill_heard()
        await pair.to_decode.abort("long")
        await pair.until_idle()


async def test_a_decode_worker_that_cannot_be_offered_it_fails_the_request(pair: Pair) -> None:
    await to_leased(pair, "long")
    await pair.to_prefill.send(
        bind=worker_pb2.PrefillBind(
            request_id="long", decode_worker_id=D, decode_epoch=EPOCH + 1, decode_address=pair.decode_address
        )
    )
    assert (await pair.to_prefill.answer("failed", "long")).grpc_code == "UNAVAILABLE"
    await pair.until_idle()


async def test_what_this_pool_cannot_hold_to_its_end_is_not_kept() -> None:
    async with worker_pair(num_blocks=9) as pair:
        large = request("large", 30, greedy(30))
        await pair.submit_prefill(large, bind_later=True)
        await pair.to_prefill.until_output("large")
        await pair.keep("large")
        failed = await pair.to_prefill.answer("failed", "large")
        assert (failed.grpc_code, failed.reason) == ("RESOURCE_EXHAUSTED", "too_long")
        await pair.until_idle()


async def bind(pair: Pair) -> None:
    await pair.bind(LONG)


async def keep(pair: Pair) -> None:
    await pair.keep("long")


async def say_nothing(pair: Pair) -> None:
    pass


@pytest.mark.parametrize("word", [bind, keep, say_nothing])
@pytest.mark.parametrize("reach", STATES)
@pytest.mark.parametrize("end", ["abort", "cut", "close", "step fails"])
async def test_whatever_ends_it_early_frees_every_block(
    pair: Pair, reach: Reach, word: Callable[[Pair], Awaitable[None]], end: str
) -> None:
    await reach(pair, "long")
    pair.decode_side.copying.close()  # so that a hand-over is not over before its end
    await word(pair)
    if end == "abort":
        await pair.abort_prefill("long")
    elif end == "cut":
        await pair.to_prefill.cut()
    elif end == "step fails":
        assert pair.prefill_side.runner is not None
        pair.prefill_side.runner.fail_next = RuntimeError("bad luck")
    else:
        stopping = asyncio.create_task(pair.prefill.stop(10.0))
        await asyncio.sleep(0)
    pair.prefill_side.computing.open()
    pair.decode_side.copying.open()
    if end == "close":
        await stopping
    else:
        if end == "step fails":
            await pair.submit_prefill(request("again", 5), hand_off=False)
            await pair.until_prefill_heard()
            await pair.to_prefill.abort("long")
        await pair.to_decode.abort("long")
        await pair.prefill_is_empty()
    await pair.to_decode.abort("long")
    await pair.decode_is_empty()
