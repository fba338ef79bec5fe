"""Requests that go from a prefill worker to a decode worker: the tokens are those of one engine alone."""

import asyncio

import pytest

from core.request import FinishReason, SamplingParams
from tests.fake_model import greedy, reference_tokens
from tests.worker_pair import request, worker_pair


async def test_tokens_equal_those_of_one_engine_and_every_report_comes_in_order() -> None:
    asked = request("a", 21)
    async with worker_pair() as pair:
        assert await pair.generate(asked) == reference_tokens(asked)
        await pair.until_idle()
        assert pair.to_prefill.kinds("a") == ["accepted", "computed", "outputs", "handed_over"]
        kinds = pair.to_decode.kinds("a")
        assert kinds[:3] == ["accepted", "landed", "outputs"]
        assert set(kinds[3:]) == {"outputs"}
        landed = await pair.to_decode.answer("landed", "a")
        assert (landed.kv_tokens_held, landed.kv_tokens_sent) == (0, 21)
        assert landed.kv_bytes == 21 * pair.decode_side.engine.layout.bytes_per_token  # type: ignore[union-attr]


async def test_a_batch_of_chunked_prompts_with_seeds_greedy_and_stops() -> None:
    asked = [
        request("greedy", 19),
        request("seeded", 13, SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=9)),
        request("short", 2, greedy(12)),
        request("long", 40, greedy(20)),
        request("two", 9, greedy(2)),
        request("penalised", 11, SamplingParams(temperature=0.5, seed=1, frequency_penalty=1.0, max_tokens=8)),
    ]
    async with worker_pair() as pair:
        got = await asyncio.gather(*(pair.generate(one) for one in asked))
        assert got == [reference_tokens(one) for one in asked]
        await pair.until_idle()


async def test_a_prefix_that_both_hold_is_neither_computed_nor_sent_again() -> None:
    first, second = request("a", 20), request("b", (*request("a", 20).prompt_token_ids, 5, 6, 7))
    async with worker_pair() as pair:
        await pair.generate(first)
        assert await pair.generate(second) == reference_tokens(second)
        computed = await pair.to_prefill.answer("computed", "b")
        landed = await pair.to_decode.answer("landed", "b")
        assert computed.cached_tokens == 20
        assert (landed.kv_tokens_held, landed.kv_tokens_sent) == (20, 3)


async def test_a_prompt_that_the_decode_worker_holds_whole_needs_no_frame() -> None:
    async with worker_pair() as pair:
        await pair.generate(request("a", 20))
        again = request("b", request("a", 20).prompt_token_ids)
        assert await pair.generate(again) == reference_tokens(again)
        landed = await pair.to_decode.answer("landed", "b")
        assert (landed.kv_tokens_sent, landed.kv_bytes) == (0, 0)


async def test_a_first_token_that_is_the_last_is_told_by_the_prefill_worker_alone() -> None:
    alone = request("alone", 10, greedy(1))
    stop_token = reference_tokens(request("stops", 10))[0]
    stops = request("stops", 10, greedy(6, stop_token_ids=(stop_token,)))
    async with worker_pair() as pair:
        await pair.submit_prefill(alone, hand_off=False)
        await pair.to_prefill.until_finished("alone")
        assert pair.token_ids("alone") == reference_tokens(alone)
        await pair.submit(stops)
        await pair.to_prefill.until_finished("stops")
        (output,) = pair.to_prefill.outputs("stops")
        assert output.finish is not None
        assert (output.finish.reason, output.finish.matched_stop) == (FinishReason.STOP, stop_token)
        await pair.to_decode.abort("stops")  # as the gateway does
        await pair.until_idle()


async def test_a_first_token_that_is_the_last_is_no_failure_of_the_decode_worker() -> None:
    stop_token = reference_tokens(request("stops", 10))[0]
    async with worker_pair() as pair:
        await pair.submit(request("stops", 10, greedy(6, stop_token_ids=(stop_token,))))
        await pair.to_prefill.until_finished("stops")
        await pair.to_decode.answer("failed", "stops")  # the prefill worker's word is here before any gateway's
        await pair.until_idle()
        counted = {
            (sample.labels["outcome"], sample.labels["reason"]): sample.value
            for sample in next(iter(pair.decode.metrics.requests.collect())).samples
            if sample.name.endswith("_total")
        }
        assert counted == {("aborted", "TransferCancelled"): 1}


async def test_gloo_carries_the_kv_too() -> None:
    asked = [request("a", 33), request("b", 5)]
    async with worker_pair(backend="gloo") as pair:
        got = await asyncio.gather(*(pair.generate(one) for one in asked))
        assert got == [reference_tokens(one) for one in asked]


@pytest.mark.parametrize("name", ["stop strings without a tokenizer", "an empty prompt"])
async def test_what_no_worker_can_serve_is_an_invalid_request_on_either_side(name: str) -> None:
    asked = request("a", (), None) if name == "an empty prompt" else request("a", 5, greedy(6, stop=("x",)))
    async with worker_pair() as pair:
        await pair.submit_decode(asked)
        assert (await pair.to_decode.answer("failed", "a")).grpc_code == "INVALID_ARGUMENT"
        await pair.submit_prefill(asked)
        assert (await pair.to_prefill.answer("failed", "a")).grpc_code == "INVALID_ARGUMENT"
        assert pair.to_prefill.kinds("a").count("failed") == 1
