"""``kill -9`` of one worker while the other one works for the same request: the survivor frees everything at once."""

import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.fake_model import greedy
from tests.worker_pair import Pair, request, worker_pair
from tests.worker_process import Hold, WorkerProcess

LONG = request("long", 40, greedy(20))


@contextlib.asynccontextmanager
async def survivor(victim: WorkerProcess, role: str) -> AsyncIterator[Pair]:
    """A pair whose other half is the process that will be killed."""
    replaced = {"prefill_address": victim.address} if role == "prefill" else {"decode_address": victim.address}
    async with worker_pair(backend="gloo", replaced=replaced) as pair:
        yield pair


@pytest.mark.parametrize("hold", ["computing", "copying"])
async def test_a_decode_worker_that_is_killed(hold: Hold) -> None:
    """`computing`: it has acknowledged and decodes. `copying`: frames are on their way."""
    async with WorkerProcess("decode", hold) as victim, survivor(victim, "decode") as pair:
        await pair.submit(LONG)
        await pair.to_prefill.until_output("long")
        await victim.until_held()
        victim.kill()
        if hold == "copying":
            failed = await pair.to_prefill.answer("failed", "long")
            assert failed.grpc_code == "UNAVAILABLE"
        assert await pair.to_decode.until_over() is not None
        await pair.prefill_is_empty()


async def test_a_decode_worker_that_is_killed_while_the_prompt_is_computed() -> None:
    async with WorkerProcess("decode") as victim, survivor(victim, "decode") as pair:
        pair.prefill_side.computing.close()
        await pair.submit(LONG)
        await pair.prefill_side.computing.until_reached()
        victim.kill()
        assert await pair.to_decode.until_over() is not None
        pair.prefill_side.computing.open()
        assert (await pair.to_prefill.answer("failed", "long")).grpc_code == "UNAVAILABLE"
        await pair.prefill_is_empty()


async def test_a_prefill_worker_that_is_killed_while_it_computes() -> None:
    async with WorkerProcess("prefill", "computing") as victim, survivor(victim, "prefill") as pair:
        await pair.submit(LONG)
        await victim.until_held()
        victim.kill()
        assert await pair.to_prefill.until_over() is not None
        # Whether an offer had come is a race. If not, only the gateway knows that nobody will send; else it is late.
        await pair.abort_decode("long")
        await pair.decode_is_empty()


async def test_a_prefill_worker_that_is_killed_while_frames_are_written() -> None:
    async with WorkerProcess("prefill") as victim, survivor(victim, "prefill") as pair:
        pair.decode_side.copying.close()
        await pair.submit(LONG)
        await pair.decode_side.copying.until_reached()
        victim.kill()
        assert await pair.to_prefill.until_over() is not None
        pair.decode_side.copying.open()
        assert (await pair.to_decode.answer("failed", "long")).grpc_code == "UNAVAILABLE"
        await pair.decode_is_empty()
