"""A profile that leaves tokens out, between two workers: it generates what two engines do that are fed by hand."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from core.ids import RequestId
from core.request import GenerateRequest
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from kv_transfer.codecs.spec import CODEC_VERSION, PipelineSpec
from kv_transfer.profile import CodecTime, Profile, ProfileLibrary, Quality, save_library
from protos import worker_pb2
from tests.fake_model import greedy, run_to_end, token_ids
from tests.worker_pair import Pair, worker_pair

TINY = ModelConfig(path=Path(__file__).parents[2] / "models" / "tiny", dtype="float32")
ENGINE = EngineConfig(num_blocks=64, max_batch_tokens=64, num_threads=1, layer_group_size=2, score_window=16)
FREE = CodecTime(fixed_s=0.0, s_per_byte=0.0)
ROUGH = Quality(
    agreement=0.6, agreement_low=0.5, agreement_high=0.7, kl=1.0, kl_low=0.9, kl_high=1.1,
    num_prompts=64, num_positions=1024, confidence=0.95,
)  # fmt: skip
HALF = PipelineSpec(kind="none", keep_ratio=0.5, keep_recent=8)
PROMPT = tuple((37 * at + 11) % 500 + 3 for at in range(80))
HELD = 32


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    return Engine.load(TINY, ENGINE), Engine.load(TINY, ENGINE)


@pytest.fixture(scope="module")
def profiles(engines: tuple[Engine, Engine], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    path = tmp_path_factory.mktemp("library") / "kv_profiles.yaml"
    half = Profile(name="half", pipeline=HALF, ratio=2.0, encode=FREE, decode=FREE, quality=ROUGH)
    library = ProfileLibrary(
        model="test",
        weights_version=engines[0].layout.weights_version,
        codec_version=CODEC_VERSION,
        machine="test",
        profiles=(Profile(name="none", pipeline=PipelineSpec(kind="none"), ratio=1.0, encode=FREE, decode=FREE), half),
    )
    save_library(library, path)
    return {"slot_bytes": 2**20, "credit_bytes": 2**22, "codec_threads": 1, "profiles": str(path), "policy": "half"}


class _Silent:
    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        pass


def asked(name: str, prompt: tuple[int, ...], floor: float) -> GenerateRequest:
    return GenerateRequest(RequestId(name), prompt, greedy(12), kv_quality_floor=floor)


def by_hand(engines: tuple[Engine, Engine], one: GenerateRequest, held: int) -> tuple[list[int], int]:
    """Prefill on one engine, hand over what is selected, decode on the other. Returns tokens and number kept."""
    source, target = engines
    assert target.reserve(one).held_tokens == held
    source.add_prefill(one, _Silent())
    tokens = token_ids(run_to_end(source)[one.request_id])
    scores = source.score_tokens(one.request_id)
    assert scores is not None
    assert HALF.selection is not None
    kept = HALF.selection.select(scores, held)
    layers, heads = range(source.layout.num_layers), range(source.layout.num_kv_heads)
    kv = source.read_tokens(one.request_id, layers, kept, heads)
    target.write_kv(one.request_id, layers, range(held, held + len(kept)), kv)
    source.release(one.request_id)
    target.activate(one.request_id, tokens, exact=False, num_dropped=len(one.prompt_token_ids) - held - len(kept))
    return tokens + token_ids(run_to_end(target)[one.request_id]), len(kept)


def exactly(engine: Engine, one: GenerateRequest) -> list[int]:
    engine.add(one)
    return token_ids(run_to_end(engine)[one.request_id])


async def landed(pair: Pair, name: str) -> worker_pb2.KvLanded:
    report: worker_pb2.KvLanded = await pair.to_decode.answer("landed", name)
    return report


async def test_half_of_the_tokens_are_handed_over(
    engines: tuple[Engine, Engine], profiles: Mapping[str, object]
) -> None:
    expected, num_kept = by_hand(engines, asked("by-hand", PROMPT, 0.5), 0)
    full = exactly(engines[0], asked("full", PROMPT, 1.0))
    assert expected != full, "the case shows nothing"
    async with worker_pair(model=TINY, engine=ENGINE, transfer=profiles) as pair:
        assert await pair.generate(asked("half", PROMPT, 0.5)) == expected
        told = await landed(pair, "half")
        assert (told.kv_profile, told.kv_lossless, told.kv_tokens_held) == ("half", False, 0)
        assert told.kv_tokens_sent == num_kept == len(PROMPT) // 2
        assert told.kv_bytes == num_kept * engines[0].layout.bytes_per_token

        assert await pair.generate(asked("exact", PROMPT, 1.0)) == full, "nothing of it was shared"
        told = await landed(pair, "exact")
        assert (told.kv_lossless, told.kv_tokens_held, told.kv_tokens_sent) == (True, 0, len(PROMPT))
        await pair.until_idle()


async def test_a_held_prefix_is_used_whole(engines: tuple[Engine, Engine], profiles: Mapping[str, object]) -> None:
    prefix = tuple(reversed(PROMPT[:HELD]))
    longer = (*prefix, *PROMPT)
    for engine in engines:
        exactly(engine, asked("prefix", prefix, 1.0))
    # the prefill side's prefix hit is the same in both ways, so that the same queries score
    expected, num_kept = by_hand(engines, asked("by-hand-2", longer, 0.5), HELD)
    async with worker_pair(model=TINY, engine=ENGINE, transfer=profiles) as pair:
        await pair.generate(asked("prefix", prefix, 1.0))
        assert await pair.generate(asked("half", longer, 0.5)) == expected
        told = await landed(pair, "half")
        assert (told.kv_tokens_held, told.kv_tokens_sent) == (HELD, num_kept)
        await pair.until_idle()


async def test_without_scores_the_profile_is_not_there(profiles: Mapping[str, object]) -> None:
    blind = ENGINE.model_copy(update={"score_window": 0})
    async with worker_pair(model=TINY, engine=blind, transfer={**profiles, "policy": "controller"}) as pair:
        await pair.generate(asked("a", PROMPT, 0.5))
        told = await landed(pair, "a")
        assert (told.kv_profile, told.kv_lossless, told.kv_tokens_sent) == ("none", True, len(PROMPT))
        await pair.until_idle()
