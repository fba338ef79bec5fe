"""Many requests of every mode at once, in pools too small for them, some given up: tokens and blocks are right.

A gateway of sorts: what a decode worker refuses is kept on the prefill worker, and what is lost or refused is counted,
not tried again.
"""

import asyncio
import random

import pytest

from core.request import GenerateRequest, SamplingParams
from protos import worker_pb2
from tests.fake_model import greedy, reference_tokens
from tests.worker_pair import Pair, request, worker_pair
from tests.worker_stream import WorkerStream

MODES = ["remote", "local", "colocated", "late"]
BINDINGS = ["accepted", "outputs"]


async def first_of(stream: WorkerStream, request_id: str, *kinds: str) -> str:
    """Return which of these kinds of report came first about a request; a finish counts as "finished"."""

    def kind_of(report: worker_pb2.PrefillReport | worker_pb2.DecodeReport) -> str:
        kind = report.WhichOneof("report") or ""
        if kind == "outputs":
            about = [one for one in report.outputs.outputs if one.request_id == request_id]
            return "finished" if any(one.HasField("finish") for one in about) else kind if about else ""
        return kind if getattr(getattr(report, kind), "request_id", None) == request_id else ""

    return kind_of(await stream.until(lambda report: kind_of(report) in kinds))


async def serve(pair: Pair, one: GenerateRequest, dice: random.Random) -> str:
    """Take a request through a mode and maybe give it up; return what became of it."""
    name, mode, binding = one.request_id, dice.choice(MODES), dice.choice(BINDINGS)
    gives_up, wants_to_bind = dice.random() < 0.25, dice.random() < 0.6
    stream = pair.to_decode if mode in ("remote", "local") else pair.to_prefill
    if mode in ("remote", "local"):
        await pair.submit_decode(one, generate=mode == "local")
    else:
        await pair.submit_prefill(one, hand_off=False, bind_later=mode == "late")
    if await first_of(stream, name, "accepted", "rejected", "failed") != "accepted":
        return "refused"
    if mode == "remote":
        await pair.submit_prefill(one)
        if await first_of(pair.to_prefill, name, "accepted", "rejected", "failed") != "accepted":
            await pair.to_decode.abort(name)
            return "refused"
    if mode == "late":
        if await first_of(stream, name, binding, "failed", "finished") != binding:
            return "ended early"
        if wants_to_bind:
            await pair.submit_decode(one)
            wants_to_bind = await first_of(pair.to_decode, name, "accepted", "rejected", "failed") == "accepted"
        if wants_to_bind:
            await pair.say_bind(one)
            stream = pair.to_decode
        else:
            await pair.keep(name)
    if gives_up:
        await pair.to_prefill.abort(name)
        await pair.to_decode.abort(name)
        return "given up"
    if stream is pair.to_decode and mode != "local":
        # A first token that is the last is the prefill worker's to tell, and then the decode worker's part has failed.
        end = await first_of(pair.to_prefill, name, "finished", "failed", "handed_over")
        if end != "handed_over":
            await pair.to_decode.abort(name)
            return end
    return await first_of(stream, name, "finished", "failed")


@pytest.mark.parametrize("seed", range(3))
async def test_a_mixture_is_right_and_leaves_nothing(seed: int) -> None:
    dice = random.Random(seed)
    sharing = tuple(range(24))
    asked = []
    for at in range(30):
        prompt = (*sharing[: dice.choice([0, 8, 16, 24])], *(dice.randrange(90) for _ in range(dice.randint(1, 20))))
        seeded = SamplingParams(temperature=0.9, seed=at, max_tokens=dice.randint(1, 15))
        asked.append(request(f"r{at}", prompt, dice.choice([greedy(dice.randint(1, 15)), seeded])))
    async with worker_pair(num_blocks=40, max_queued_tokens=300) as pair:
        ends = await asyncio.gather(*(serve(pair, one, dice) for one in asked))
        await pair.until_prefill_heard()
        await pair.until_idle()
        finished = [one for one, end in zip(asked, ends, strict=True) if end == "finished"]
        assert [pair.token_ids(one.request_id) for one in finished] == [reference_tokens(one) for one in finished]
        assert len(finished) >= 5, ends
        failures = [
            report.failed for report in (*pair.to_prefill.reports, *pair.to_decode.reports) if report.HasField("failed")
        ]
        assert "failed" not in ends, failures
