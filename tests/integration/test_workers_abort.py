"""A request that ends early, in any state and for any reason, leaves nothing behind on either worker.

`until_idle` asserts that every block of both engines is free or cached and that no request is left.
"""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from protos import codec, worker_pb2
from tests.fake_model import greedy, reference_tokens
from tests.worker_pair import Pair, request, worker_pair
from tests.worker_stream import prefill_stream

LONG = request("long", 30, greedy(30))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with worker_pair() as pair:
        yield pair


async def to_reserved(pair: Pair) -> None:
    """Accepted by the decode worker, never offered."""
    await pair.submit_decode(LONG)
    await pair.to_decode.answer("accepted", "long")


async def to_computing(pair: Pair) -> None:
    """The prefill worker is inside a forward pass."""
    pair.prefill_side.computing.close()
    await pair.submit(LONG)
    await pair.prefill_side.computing.until_reached()


async def to_sending(pair: Pair) -> None:
    """The first token is out, and the decode worker is inside the copying of a frame."""
    pair.decode_side.copying.close()
    await pair.submit(LONG)
    await pair.to_prefill.until_output("long")
    await pair.decode_side.copying.until_reached()


async def to_decoding(pair: Pair) -> None:
    """The decode worker is inside a forward pass of the request."""
    pair.decode_side.computing.close()
    await pair.submit(LONG)
    await pair.decode_side.computing.until_reached()


STATES = [to_reserved, to_computing, to_sending, to_decoding]
Reach = Callable[[Pair], Awaitable[None]]


def open_gates(pair: Pair) -> None:
    for side in (pair.prefill_side, pair.decode_side):
        side.computing.open()
        side.copying.open()


async def serves_again(pair: Pair) -> None:
    """The same id may be used again, and comes out right."""
    again = request("long", 30, greedy(5))
    await pair.submit_decode(again, attempt=7)
    await pair.submit_prefill(again, attempt=7)
    await pair.to_decode.until_finished("long")
    decoded = [token.token_id for output in pair.to_decode.outputs("long") for token in output.tokens]
    assert decoded[-4:] == reference_tokens(again)[1:]


@pytest.mark.parametrize("reach", STATES)
async def test_an_abort_by_the_gateway_frees_both_sides(pair: Pair, reach: Reach) -> None:
    await reach(pair)
    await pair.abort_decode("long")
    await pair.abort_prefill("long")
    open_gates(pair)
    await pair.until_idle()
    await serves_again(pair)
    assert "failed" not in pair.to_decode.kinds("long")


@pytest.mark.parametrize("reach", STATES)
async def test_an_abort_of_the_decode_side_alone_frees_the_prefill_side_too(pair: Pair, reach: Reach) -> None:
    await reach(pair)
    await pair.abort_decode("long")
    open_gates(pair)
    await pair.until_idle()
    if reach in (to_computing, to_sending):
        failed = await pair.to_prefill.answer("failed", "long")
        assert (failed.grpc_code, failed.reason) == ("UNAVAILABLE", "cancelled")


@pytest.mark.parametrize("reach", [to_computing, to_sending])
async def test_an_abort_of_the_prefill_side_alone_frees_the_decode_side_too(pair: Pair, reach: Reach) -> None:
    await reach(pair)
    await pair.abort_prefill("long")
    open_gates(pair)
    await pair.until_idle()
    assert (await pair.to_decode.answer("failed", "long")).grpc_code == "UNAVAILABLE"


@pytest.mark.parametrize("reach", STATES)
async def test_a_gateway_that_dies_frees_both_sides(reach: Reach) -> None:
    async with worker_pair() as pair:
        await reach(pair)
        await pair.to_decode.cut()
        await pair.to_prefill.cut()
        open_gates(pair)
        await pair.until_idle()


@pytest.mark.parametrize("reach", [to_computing, to_sending])
async def test_a_stream_that_is_lost_on_one_side_frees_the_other_side_too(reach: Reach) -> None:
    async with worker_pair() as pair:
        await reach(pair)
        await pair.to_prefill.cut()
        async with prefill_stream(pair.prefill_address) as again:  # welcomed after the loss was taken
            await again.until(lambda report: report.HasField("load"))
            open_gates(pair)
            await pair.until_idle()
            assert not again.outputs("long")
        assert (await pair.to_decode.answer("failed", "long")).grpc_code == "UNAVAILABLE"


@pytest.mark.parametrize("reach", STATES)
async def test_stopping_the_workers_in_the_middle_ends_the_streams_and_frees_everything(reach: Reach) -> None:
    async with worker_pair() as pair:
        await reach(pair)
        open_gates(pair)
        await pair.prefill.stop(10.0)
        await pair.decode.stop(10.0)
        await pair.to_prefill.until_over()
        await pair.to_decode.until_over()


async def test_a_reservation_without_an_offer_lapses(pair: Pair) -> None:
    await pair.submit_decode(LONG, lease_s=0.05)
    failed = await pair.to_decode.answer("failed", "long")
    assert failed.grpc_code == "UNAVAILABLE"
    await pair.until_idle()


async def test_an_offer_without_a_reservation_fails_the_prefill(pair: Pair) -> None:
    await pair.submit_decode(LONG)
    await pair.to_decode.answer("accepted", "long")
    await pair.abort_decode("long")
    await pair.until_idle()
    await pair.submit_prefill(LONG)
    assert (await pair.to_prefill.answer("failed", "long")).grpc_code == "UNAVAILABLE"
    await pair.until_idle()


async def test_a_step_that_fails_loses_its_requests_and_not_the_worker(pair: Pair) -> None:
    await to_computing(pair)
    assert pair.prefill_side.runner is not None
    pair.prefill_side.runner.fail_next = RuntimeError("bad luck")
    open_gates(pair)
    failed = await pair.to_prefill.answer("failed", "long")
    assert failed.grpc_code == "UNAVAILABLE"
    assert "bad luck" in failed.detail
    await pair.until_idle()
    other = request("other", 12)
    assert await pair.generate(other) == reference_tokens(other)


async def test_a_decode_step_that_fails_is_told_too(pair: Pair) -> None:
    await to_decoding(pair)
    assert pair.decode_side.runner is not None
    pair.decode_side.runner.fail_next = RuntimeError("bad luck")
    open_gates(pair)
    assert "bad luck" in (await pair.to_decode.answer("failed", "long")).detail
    await pair.until_idle()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_an_abort_that_is_late_changes_nothing(pair: Pair, side: str) -> None:
    stream = pair.to_prefill if side == "prefill" else pair.to_decode
    await stream.abort("never seen")
    asked = request("a", 12)
    assert await pair.generate(asked) == reference_tokens(asked)
    await stream.abort("a")
    again = request("b", 12)
    assert await pair.generate(again) == reference_tokens(again)


async def test_a_gateway_cannot_abort_what_came_over_another_stream(pair: Pair) -> None:
    await to_computing(pair)
    async with prefill_stream(pair.prefill_address) as other:
        await other.abort("long")
        await other.send(submit=worker_pb2.PrefillSubmit(request=codec.request_to_wire(LONG), transfer_id="x"))
        assert (await other.answer("rejected", "long")).reason == "duplicate"
        open_gates(pair)
        await pair.to_decode.until_finished("long")
        assert not other.outputs("long")
    assert pair.token_ids("long") == reference_tokens(LONG)
