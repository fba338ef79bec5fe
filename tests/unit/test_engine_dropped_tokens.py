"""A hand-off that leaves tokens out: what the engine generates then is what transformers does with such a cache."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from core.ids import RequestId
from core.request import GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.runner import ModelRunner
from engine.token_scores import SMOOTHED_TOKENS, attention_to, smooth
from tests import model_matrix
from tests.fake_model import run_to_end, token_ids

NEW_TOKENS = 24
PROMPT = tuple(3 + (at * 37) % 290 for at in range(70))
KEPT = torch.tensor([at for at in range(70) if at < 4 or at >= 50 or at % 3 == 0])


@dataclass(frozen=True, slots=True)
class Pair:
    path: Path
    source: Engine
    target: Engine


class _Silent:
    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        pass


def engine(path: Path, block_size: int, *, num_blocks: int = 64, score_window: int = 0, fuse: bool = True) -> Engine:
    config = EngineConfig(
        block_size=block_size, num_blocks=num_blocks, score_window=score_window, fuse_modules=fuse, num_threads=1
    )
    return Engine(ModelRunner.load(ModelConfig(path=path, dtype="float32"), config), config)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = model_matrix.checkpoint(request.param, tmp_path_factory.mktemp("models"))
    return Pair(path, engine(path, 16, score_window=8), engine(path, 8))


def expected(path: Path, kept: torch.Tensor, first_token: int) -> list[int]:
    """Greedy tokens of transformers from a cache that holds only `kept`, at the positions that the tokens have."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        full = model(torch.tensor([PROMPT]), use_cache=True).past_key_values
        cache = DynamicCache()
        for at, layer in enumerate(full.layers):
            cache.update(layer.keys[:, :, kept], layer.values[:, :, kept], at)
        tokens = [first_token]
        while len(tokens) < NEW_TOKENS:
            position = len(PROMPT) + len(tokens) - 1
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, position_ids=torch.tensor([[position]]))
            tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def hand_over(pair: Pair, name: str, kept: torch.Tensor) -> tuple[GenerateRequest, int]:
    """Prefill on one engine, write only `kept` into the other; return the request and its first token."""
    one = GenerateRequest(
        RequestId(name), PROMPT, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    )
    assert pair.target.reserve(one).held_tokens == 0
    pair.source.add_prefill(one, _Silent())
    (first,) = token_ids(run_to_end(pair.source)[one.request_id])
    layout = pair.source.layout
    layers, heads = range(layout.num_layers), range(layout.num_kv_heads)
    kv = pair.source.read_tokens(one.request_id, layers, kept, heads)
    pair.target.write_kv(one.request_id, layers, range(len(kept)), kv)
    pair.source.release(one.request_id)
    return one, first


def test_generates_what_transformers_does_without_these_tokens(pair: Pair) -> None:
    one, first = hand_over(pair, "a", KEPT)
    free = pair.target.load_report().free_blocks
    pair.target.activate(one.request_id, [first], exact=False, num_dropped=len(PROMPT) - len(KEPT))
    pair.target.check()
    assert pair.target.load_report().free_blocks > free, "blocks of dropped tokens are free"
    generated = [first, *token_ids(run_to_end(pair.target)[one.request_id])]
    assert generated == expected(pair.path, KEPT, first)
    assert generated != expected(pair.path, torch.arange(len(PROMPT)), first), "the case shows nothing"
    assert pair.target.load_report().free_blocks == 64
    assert pair.target.load_report().cached_blocks == 0, "nothing of it is shared"


def test_nothing_dropped_is_the_ordinary_hand_off(pair: Pair) -> None:
    one, first = hand_over(pair, "b", torch.arange(len(PROMPT)))
    pair.target.activate(one.request_id, [first], exact=False)
    assert [first, *token_ids(run_to_end(pair.target)[one.request_id])] == expected(
        pair.path, torch.arange(len(PROMPT)), first
    )


def test_preempted_it_is_computed_again_with_every_token(pair: Pair) -> None:
    small = engine(pair.path, 8, num_blocks=16)
    one, first = hand_over(Pair(pair.path, pair.source, small), "c", KEPT)
    small.activate(one.request_id, [first], exact=False, num_dropped=len(PROMPT) - len(KEPT))
    older = GenerateRequest(
        RequestId("older"), PROMPT[:60], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    )
    small._live[one.request_id].arrival = 10  # so that it is the younger one, whose blocks are taken
    small.add(older)
    tokens = [first]
    was_preempted = False
    while small.has_work():
        for output in small.step():
            if output.request_id == one.request_id:
                tokens += [token.token_id for token in output.tokens]
        was_preempted |= small.last_step.num_preempted > 0
        small.check()
    assert was_preempted
    assert len(tokens) == NEW_TOKENS
    assert small.load_report().free_blocks == 16


def test_scores_are_what_the_last_tokens_attend_to(pair: Pair) -> None:
    prompt = PROMPT[::-1]  # not in the cache: of a cached prompt fewer queries are computed
    one = GenerateRequest(RequestId("d"), prompt, SamplingParams(temperature=0.0, max_tokens=4))
    pair.source.add_prefill(one, _Silent())
    run_to_end(pair.source)
    scores = pair.source.score_tokens(one.request_id)
    assert scores is not None
    model = AutoModelForCausalLM.from_pretrained(pair.path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        attentions = model(torch.tensor([prompt]), output_attentions=True).attentions
    wanted = smooth(torch.stack([layer[0, :, -8:] for layer in attentions]).sum((0, 1, 2)))
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    pair.source.release(one.request_id)


def test_plain_layers_give_the_same_scores(pair: Pair) -> None:
    plain = engine(pair.path, 16, score_window=8, fuse=False)
    one = GenerateRequest(RequestId("e"), PROMPT[::2], SamplingParams(temperature=0.0, max_tokens=4))
    for other in (plain, pair.source):
        other.add_prefill(one, _Silent())
        run_to_end(other)
    ours, theirs = plain.score_tokens(one.request_id), pair.source.score_tokens(one.request_id)
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    pair.source.release(one.request_id)


def test_a_model_with_a_window_keeps_no_scores(tmp_path: Path) -> None:
    windowed = engine(model_matrix.checkpoint("mistral", tmp_path), 16, score_window=8)
    one = GenerateRequest(RequestId("f"), PROMPT, SamplingParams(temperature=0.0, max_tokens=4))
    windowed.add_prefill(one, _Silent())
    run_to_end(windowed)
    assert windowed.score_tokens(one.request_id) is None


def test_attention_of_each_query_sums_to_one() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = attention_to(torch.randn(5, 6, 8, generator=generator), torch.randn(2, 9, 8, generator=generator))
    assert scores.sum().item() == pytest.approx(5 * 6)


def test_smoothing_is_the_mean_of_neighbours() -> None:
    scores = torch.arange(12.0) ** 2
    half = SMOOTHED_TOKENS // 2
    for at, value in enumerate(smooth(scores)):
        near = scores[max(0, at - half) : at + half + 1]
        assert value.item() == pytest.approx(near.mean().item())
