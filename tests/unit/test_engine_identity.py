"""Token identity over the model matrix, float32: the engine against `transformers` generate, and against itself.

Greedy output equals transformers token for token, whatever the batch, the chunks and the cache; seeded samples are the
same whatever the batch, the chunks, one engine or two with the KV handed over.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from core.ids import RequestId
from core.request import GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.runner import ModelRunner
from tests import model_matrix
from tests.fake_model import run_to_end, token_ids

NEW_TOKENS = 20
BLOCK_SIZES = (16, 8)  # of the two engines of a hand-off


@dataclass(frozen=True, slots=True)
class Family:
    runner: ModelRunner
    other: ModelRunner
    prompts: list[tuple[int, ...]]
    greedy: list[list[int]]

    def engine(self, max_batch_tokens: int = 512, *, is_other: bool = False) -> Engine:
        """A new engine with an empty cache on one of the two loaded models."""
        runner = self.other if is_other else self.runner
        config = EngineConfig(
            block_size=runner.pool.layout.block_size, max_batch_tokens=max_batch_tokens, layer_group_size=2
        )
        return Engine(runner, config)


@pytest.fixture(scope="module", params=[*model_matrix.FAMILIES, "tiny"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    path: Path = model_matrix.checkpoint(request.param, tmp_path_factory.mktemp("models"))
    runners = [
        ModelRunner.load(
            ModelConfig(path=path, dtype="float32"), EngineConfig(block_size=size, num_blocks=2048 // size)
        )
        for size in BLOCK_SIZES
    ]
    prompts = model_matrix.prompts(runners[0].info.vocab_size)
    return Family(runners[0], runners[1], prompts, model_matrix.generate(path, prompts, NEW_TOKENS))


def requests(prompts: list[tuple[int, ...]], *, is_seeded: bool = False) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            RequestId(f"r{at}"),
            prompt,
            SamplingParams(temperature=0.9, seed=at, top_k=50, top_p=0.95, frequency_penalty=0.2, max_tokens=NEW_TOKENS)
            if is_seeded
            else SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS),
        )
        for at, prompt in enumerate(prompts)
    ]


def together(engine: Engine, wanted: list[GenerateRequest]) -> list[list[int]]:
    for request in wanted:
        engine.add(request)
    outputs = run_to_end(engine)
    return [token_ids(outputs[request.request_id]) for request in wanted]


def one_by_one(engine: Engine, wanted: list[GenerateRequest]) -> list[list[int]]:
    return [together(engine, [request])[0] for request in wanted]


class Copier:
    """Copies every part over as soon as it is ready."""

    def __init__(self, source: Engine, target: Engine, held_tokens: int) -> None:
        self._source, self._target, self._held = source, target, held_tokens

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        tokens = range(max(tokens.start, self._held), tokens.stop)
        if tokens:
            self._target.write_kv(request_id, layers, tokens, self._source.read_kv(request_id, layers, tokens))


def handed_over(source: Engine, target: Engine, wanted: list[GenerateRequest]) -> list[list[int]]:
    for request in wanted:
        held = target.reserve(request).held_tokens
        source.add_prefill(request, Copier(source, target, held))
    first = run_to_end(source)
    generated: dict[RequestId, list[int]] = {}
    for request in wanted:
        request_id = request.request_id
        generated[request_id] = token_ids(first[request_id])
        if first[request_id][-1].finish is not None:
            target.abort(request_id)
        else:
            source.release(request_id)
            target.activate(request_id, generated[request_id])
    for name, outputs in run_to_end(target).items():
        generated[RequestId(name)] += token_ids(outputs)
    return [generated[request.request_id] for request in wanted]


@pytest.mark.parametrize("chunk", [17, 64, 512])
def test_greedy_equals_transformers(family: Family, chunk: int) -> None:
    engine = family.engine(chunk)
    wanted = requests(family.prompts)
    assert together(engine, wanted) == family.greedy, "16 at once, cold"
    assert engine.load_report().cached_blocks > 0
    assert together(engine, wanted) == family.greedy, "16 at once, prefix hits"


def test_greedy_alone_equals_transformers(family: Family) -> None:
    wanted = requests(family.prompts)
    assert one_by_one(family.engine(), wanted) == family.greedy, "the odd ones hit what the one before left"


def test_two_engines_equal_transformers(family: Family) -> None:
    source, target = family.engine(48), family.engine(is_other=True)
    wanted = requests(family.prompts)
    assert handed_over(source, target, wanted) == family.greedy, "cold"
    assert handed_over(source, target, wanted) == family.greedy, "prefix held on both sides"
    assert handed_over(target, source, wanted) == family.greedy, "the other way round"


def test_seeded_samples_are_the_same_everywhere(family: Family) -> None:
    wanted = requests(family.prompts, is_seeded=True)
    alone = one_by_one(family.engine(), wanted)
    assert len({tuple(tokens) for tokens in alone}) > 12, "the seeds differ"
    assert alone != family.greedy
    for chunk in (17, 512):
        assert together(family.engine(chunk), wanted) == alone
    assert handed_over(family.engine(48), family.engine(is_other=True), wanted) == alone
