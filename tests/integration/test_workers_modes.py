"""A trained model in every mode of serving: each gives, token for token, what one engine alone gives."""

import asyncio
from pathlib import Path

import pytest

from core.request import GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from tests.fake_model import greedy, run_to_end, token_ids
from tests.worker_pair import Pair, request, worker_pair

TINY = ModelConfig(path=Path(__file__).parents[2] / "models" / "tiny", dtype="float32")
ENGINE = EngineConfig(num_blocks=64, max_batch_tokens=32, num_threads=1, layer_group_size=2)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=14, ignore_eos=True)
MODES = [
    "remote",
    "local",
    "local after a hit",
    "colocated",
    "bound at once",
    "bound late",
    "kept at once",
    "kept late",
]


async def generate(pair: Pair, one: GenerateRequest, mode: str) -> list[int]:
    name = one.request_id
    if mode == "remote":
        return await pair.generate(one)
    stream = pair.to_decode if mode.startswith(("local", "bound")) else pair.to_prefill
    if mode.startswith("local"):
        await pair.submit_decode(one, generate=True)
    else:
        await pair.submit_prefill(one, hand_off=False, bind_later=mode != "colocated")
        if mode.endswith("late"):
            await pair.to_prefill.until_output(name)
    if mode.startswith("bound"):
        await pair.bind(one)
    elif mode.startswith("kept"):
        await pair.keep(name)
    await stream.until_finished(name)
    return pair.token_ids(name)


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, str], list[int]]:
    """What one engine generates, by length of the prompt and kind of sampling."""
    engine = Engine.load(TINY, ENGINE)
    tokens = {}
    for length in (50, 75):
        for kind, sampling in (("greedy", greedy(12)), ("seeded", SEEDED)):
            one = request("x", prompt_of(length), sampling)
            engine.add(one)
            tokens[length, kind] = token_ids(run_to_end(engine)["x"])
    return tokens


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple((37 * at + length) % 500 + 3 for at in range(length))


async def test_every_mode_gives_the_tokens_of_one_engine(expected: dict[tuple[int, str], list[int]]) -> None:
    for mode in MODES:
        async with worker_pair(model=TINY, engine=ENGINE) as pair:
            if mode == "local after a hit":
                await pair.generate(request("warm", prompt_of(75)[:48]))
            asked = {
                (length, kind): request(f"{kind}{length}", prompt_of(length), sampling)
                for length in (50, 75)
                for kind, sampling in (("greedy", greedy(12)), ("seeded", SEEDED))
            }
            got = await asyncio.gather(*(generate(pair, one, mode) for one in asked.values()))
            assert dict(zip(asked, got, strict=True)) == expected, mode
            if mode == "local after a hit":
                assert (await pair.to_decode.answer("computed", "greedy75")).cached_tokens >= 48
            await pair.until_idle()
