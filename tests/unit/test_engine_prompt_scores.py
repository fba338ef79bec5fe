"""Log-probabilities of prompts: those of transformers for real models, exact ones whatever the schedule for a fake."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig

from core.ids import RequestId
from core.request import GenerateRequest, PromptToken, RequestOutput, SamplingParams
from engine import prompt_scores
from engine.config import EngineConfig, ModelConfig
from engine.contract import NoFiniteLogits
from engine.engine import Engine
from engine.logprobs import token_details
from engine.runner import ModelRunner
from tests import model_matrix
from tests.fake_model import EOS, FakeRunner, fake_engine, greedy, history_logits, reference_tokens, run_to_end
from tests.fake_model import token_ids as ids_of

TOLERANCE = 2e-4  # float32, of log-probabilities: only the order of sums differs
FUSED = EngineConfig(num_blocks=128, num_threads=1)
PLAIN = EngineConfig(num_blocks=128, num_threads=1, attention_backend="sdpa")
# Granite scales its logits behind the head, which the plain path must not lose.
GRANITE = GraniteConfig(
    vocab_size=model_matrix.VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, logits_scaling=3.0, embedding_multiplier=2.0,
    initializer_range=0.2, max_position_embeddings=256,
)  # fmt: skip


def scored(name: str, prompt: tuple[int, ...], alternatives: int, **changes: object) -> GenerateRequest:
    return GenerateRequest(RequestId(name), prompt, greedy(4, prompt_logprobs=alternatives, **changes))


def scores_of(outputs: list[RequestOutput]) -> tuple[PromptToken, ...]:
    """The scored prompt, which comes once, with the first token."""
    assert outputs[0].tokens[0].index == 0
    assert not any(output.prompt_tokens for output in outputs[1:])
    return outputs[0].prompt_tokens


# Against transformers


def checkpoint(family: str, folder: Path) -> Path:
    if family != "granite":
        return model_matrix.checkpoint(family, folder)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(GRANITE, dtype=torch.float32).save_pretrained(folder / family)
    return folder / family


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", FUSED), ("qwen3", FUSED), ("tiny", FUSED), ("mistral", PLAIN), ("granite", PLAIN)],
    ids=["llama fused", "qwen3 fused", "tiny fused", "mistral plain", "granite plain"],
)
def test_equal_those_of_transformers_however_the_prompt_is_cut(
    family: str, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    runner = ModelRunner.load(ModelConfig(path=path, dtype="float32"), config)
    monkeypatch.setattr(prompt_scores, "_LOGITS_AT_ONCE", 11 * runner.info.vocab_size)
    generator = torch.Generator().manual_seed(2)
    prompts = [
        tuple(torch.randint(2, runner.info.vocab_size, (length,), generator=generator).tolist())
        for length in (1, 2, 40, 130)
    ]
    with torch.inference_mode():
        wanted = [model(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in prompts]
    for chunk in (17, 64, 512):
        engine = Engine(runner, config.model_copy(update={"max_batch_tokens": chunk}))
        for number, prompt in enumerate(prompts):
            engine.add(scored(f"r{number}", prompt, 5))
            engine.add(GenerateRequest(RequestId(f"mate{number}"), prompt, greedy(4)))  # asks for nothing
        outputs = run_to_end(engine)
        for number, prompt in enumerate(prompts):
            scores = scores_of(outputs[f"r{number}"])
            assert [token.token_id for token in scores] == list(prompt)
            assert (scores[0].logprob, scores[0].top_logprobs) == (None, ())
            for position, token in enumerate(scores[1:]):
                row = wanted[number][position]
                assert token.logprob == pytest.approx(row[token.token_id].item(), abs=TOLERANCE)
                assert len(token.top_logprobs) == 5
                best = torch.topk(row, 5).values.tolist()
                for found, value in zip(token.top_logprobs, best, strict=True):
                    assert found.logprob == pytest.approx(value, abs=TOLERANCE)
                    assert found.logprob == pytest.approx(row[found.token_id].item(), abs=TOLERANCE)
            assert scores_of(outputs[f"mate{number}"]) == ()
            assert ids_of(outputs[f"r{number}"]) == ids_of(outputs[f"mate{number}"]), "scoring changes no token"


def test_logits_of_a_chunk_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def logits(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return states.clone()

    states = torch.randn((50, 97), generator=torch.Generator().manual_seed(1))
    following, counts = list(range(50)), [3] * 50
    whole = prompt_scores.details_of(states, logits, following, counts, 97)
    monkeypatch.setattr(prompt_scores, "_LOGITS_AT_ONCE", 8 * 97)
    assert prompt_scores.details_of(states, logits, following, counts, 97) == whole
    assert sizes == [50, 8, 8, 8, 8, 8, 8, 2]


# Exact, on a model whose logits are a function of the history


def reference(prompt: tuple[int, ...], alternatives: int) -> tuple[PromptToken, ...]:
    told = [PromptToken(prompt[0], None)]
    for at in range(1, len(prompt)):
        logprobs = history_logits(prompt[:at])[None].log_softmax(1)
        (detail,) = token_details(logprobs, [prompt[at]], [alternatives])
        told.append(PromptToken(prompt[at], detail.logprob, detail.top_logprobs))
    return tuple(told)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, EOS, (length,), generator=generator).tolist())


@pytest.mark.parametrize("chunk", [3, 16, 100])
def test_a_batch_of_all_kinds(chunk: int) -> None:
    engine = fake_engine(num_blocks=200, max_batch_tokens=chunk)
    lengths, alternatives = (1, 5, 31, 20), (0, 20, 2, 7)
    for at in range(4):
        engine.add(scored(f"r{at}", prompt_of(at, lengths[at]), alternatives[at]))
        engine.add(GenerateRequest(RequestId(f"mate{at}"), prompt_of(9 + at, 17), greedy(4, logprobs=1)))
    outputs = run_to_end(engine)
    for at in range(4):
        assert scores_of(outputs[f"r{at}"]) == reference(prompt_of(at, lengths[at]), alternatives[at])
        assert scores_of(outputs[f"mate{at}"]) == ()


def test_sampling_parameters_do_not_touch_the_scores() -> None:
    engine, prompt = fake_engine(num_blocks=64), prompt_of(1, 20)
    bent: dict[str, object] = {
        "logit_bias": {prompt[3]: 50.0}, "repetition_penalty": 2.0, "min_tokens": 3, "stop_token_ids": (prompt[5],),
    }  # fmt: skip
    engine.add(scored("r", prompt, 4, **bent))
    assert scores_of(run_to_end(engine)["r"]) == reference(prompt, 4)


def test_a_cached_prefix_is_computed_again_and_cached_by_it() -> None:
    engine, prompt = fake_engine(num_blocks=64, max_batch_tokens=7), prompt_of(1, 22)
    plain = GenerateRequest(RequestId("plain"), prompt, greedy(4))
    engine.add(plain)
    first = run_to_end(engine)["plain"]
    assert engine.add(replace(plain, request_id=RequestId("again"))) == 20, "the prefix is cached"
    run_to_end(engine)
    assert engine.add(scored("r", prompt, 2)) == 0
    outputs = []
    while engine.has_work():
        outputs += engine.step()
        assert all(admission.cached_tokens == 0 for admission in engine.last_step.admitted)
        engine.check()
    assert scores_of(outputs) == reference(prompt, 2)
    assert ids_of(outputs) == ids_of(first)

    fresh = fake_engine(num_blocks=64)
    fresh.add(scored("r", prompt, 2))
    run_to_end(fresh)
    assert fresh.add(plain) == 20, "what a scored prompt computed is there for others"


@pytest.mark.parametrize(
    ("num_blocks", "chunk", "at_tokens"), [(17, 3, 7), (16, 6, 24), (17, 6, 30)], ids=["early", "late", "decoding"]
)
def test_preempted_no_score_is_lost_or_told_twice(num_blocks: int, chunk: int, at_tokens: int) -> None:
    prompts = [prompt_of(at, length) for at, length in enumerate((9, 9, 30))]
    engine = fake_engine(num_blocks=num_blocks, max_batch_tokens=chunk)
    for at, prompt in enumerate(prompts):
        engine.add(GenerateRequest(RequestId(f"r{at}"), prompt, greedy(14, prompt_logprobs=3, ignore_eos=True)))
    youngest = engine._live[RequestId("r2")]
    preempted_at = []
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work():
        num_computed = youngest.num_computed
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if engine.last_step.num_preempted:
            preempted_at.append(num_computed)
        engine.check()
    assert preempted_at == [at_tokens]
    for at, prompt in enumerate(prompts):
        assert scores_of(outputs[f"r{at}"]) == reference(prompt, 3)
        request = GenerateRequest(RequestId("x"), prompt, greedy(14, ignore_eos=True))
        assert ids_of(outputs[f"r{at}"]) == reference_tokens(request)


class Copier:
    """Copies every part over as soon as it is ready."""

    def __init__(self, source: Engine, target: Engine, held_tokens: int) -> None:
        self._source, self._target, self._held = source, target, held_tokens

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        tokens = range(max(tokens.start, self._held), tokens.stop)
        if tokens:
            self._target.write_kv(request_id, layers, tokens, self._source.read_kv(request_id, layers, tokens))


def test_handed_over_the_prefill_side_tells_and_the_decode_side_does_not_compute_them() -> None:
    source, target = fake_engine(num_blocks=64, max_batch_tokens=7), fake_engine(num_blocks=64)
    request = scored("r", prompt_of(1, 22), 2)
    for attempt in range(2):  # cold, and with the prefix on both sides
        held = target.reserve(request).held_tokens
        assert held == (20 if attempt else 0)
        source.add_prefill(request, Copier(source, target, held))
        (first,) = run_to_end(source)["r"]
        assert first.prompt_tokens == reference(request.prompt_token_ids, 2)
        source.release(request.request_id)
        target.activate(request.request_id, [first.tokens[0].token_id])
        rest = run_to_end(target)["r"]
        assert not any(output.prompt_tokens for output in rest)
        assert [first.tokens[0].token_id, *ids_of(rest)] == reference_tokens(request)


def test_a_reservation_that_is_preempted_computes_tokens_only() -> None:
    target = fake_engine(num_blocks=12)
    source = fake_engine(num_blocks=64)
    params = greedy(12, prompt_logprobs=2, ignore_eos=True)
    requests = [GenerateRequest(RequestId(f"r{at}"), prompt_of(at, 18), params) for at in range(2)]
    outputs: dict[str, list[RequestOutput]] = {}
    for request in requests:
        source.add_prefill(request, Copier(source, target, target.reserve(request).held_tokens))
        (first,) = run_to_end(source)[request.request_id]
        source.release(request.request_id)
        target.activate(request.request_id, [first.tokens[0].token_id])
    num_preempted = 0
    while target.has_work():
        for output in target.step():
            outputs.setdefault(output.request_id, []).append(output)
        num_preempted += target.last_step.num_preempted
    assert num_preempted
    assert not any(output.prompt_tokens for several in outputs.values() for output in several)


def test_kept_after_its_lease_the_scores_are_told_once_and_the_cache_is_used() -> None:
    source, request = fake_engine(num_blocks=64), scored("r", prompt_of(1, 22), 2)
    source.add_prefill(request, Copier(source, source, 22))
    (first,) = run_to_end(source)["r"]
    source.keep(request.request_id)
    rest = run_to_end(source)["r"]
    assert first.prompt_tokens == reference(request.prompt_token_ids, 2)
    assert not any(output.prompt_tokens for output in rest)
    assert ids_of([first, *rest]) == reference_tokens(request)


def runner_of(engine: Engine) -> FakeRunner:
    runner = engine._executor._runner
    assert isinstance(runner, FakeRunner)
    return runner


def test_a_distribution_that_is_none_ends_that_request_alone() -> None:
    engine, prompt = fake_engine(num_blocks=64), prompt_of(1, 12)
    runner = runner_of(engine)
    logits: Callable[[torch.Tensor], torch.Tensor] = runner.logits
    broken = logits(torch.tensor([[*prompt[:5], -1]])).argmax().item()  # any number that identifies the row

    def with_a_hole(states: torch.Tensor) -> torch.Tensor:
        made = logits(states)
        made[(states[:, 5] == -1) & (states[:, 4] == prompt[4]) & (made.argmax(1) == broken)] = torch.nan
        return made

    runner.logits = with_a_hole  # type: ignore[method-assign]
    engine.add(scored("r", prompt, 2))
    engine.add(GenerateRequest(RequestId("mate"), prompt, greedy(4)))
    outputs = run_to_end(engine)
    (failed,) = engine.take_failed()
    assert failed[0] == "r"
    assert isinstance(failed[1], NoFiniteLogits)
    assert "r" not in outputs
    assert ids_of(outputs["mate"]) == reference_tokens(GenerateRequest(RequestId("x"), prompt, greedy(4)))


def test_more_alternatives_than_allowed_are_refused() -> None:
    with pytest.raises(Exception, match="prompt_logprobs"):
        fake_engine().add(GenerateRequest(RequestId("r"), (1, 2), SamplingParams(prompt_logprobs=21)))
