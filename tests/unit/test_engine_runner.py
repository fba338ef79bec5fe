"""The runner against transformers' own forward pass, for every family, path and way to cut a prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from engine import fused
from engine.config import EngineConfig, ModelConfig
from engine.forward import SequenceChunk
from engine.runner import ModelRunner

SIZES: dict[str, Any] = {
    "vocab_size": 311,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that logits differ clearly
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied, biases, mha, scaled rope": LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4},
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "mistral": MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "mistral window": MistralConfig(**SIZES, head_dim=32, sliding_window=24),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 window in later layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
TOLERANCE = 2e-4  # float32: only the order of sums differs
# bfloat16 rounds after every product, on both sides: ours may be this much farther from the float32 truth (root mean
# square over all logits of the test) than transformers in bfloat16 is.
MAX_ERROR_RATIO = 1.2
ENGINES = {
    "fused": EngineConfig(num_blocks=48, num_threads=1),
    "plain, numba attention": EngineConfig(num_blocks=48, num_threads=1, fuse_modules=False),
    "plain, sdpa": EngineConfig(num_blocks=48, num_threads=1, attention_backend="sdpa"),
}


def save(config: PreTrainedConfig, path: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases of one and zero would hide mistakes
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model.eval()


def run(runner: ModelRunner, *chunks: SequenceChunk) -> torch.Tensor:
    return runner.forward(runner.batch(list(chunks)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, dtype: Any, tmp_path: Path) -> None:
    save(FAMILIES[family], tmp_path)
    # Loaded, not converted: `.to(bfloat16)` would round the rotary frequencies, which loading keeps in float32.
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    token_ids = torch.randint(0, 311, (3, 90), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = reference(token_ids).logits.float()
        want = reference.float()(token_ids).logits
    first, second, third = (row.tolist() for row in token_ids)
    tables = [list(range(i, 48, 3)) for i in range(3)]
    for name, engine in ENGINES.items():
        runner = ModelRunner.load(ModelConfig(path=tmp_path, dtype=dtype), engine)
        assert runner.fused == (name == "fused")

        seen: list[tuple[int, int]] = []
        results: list[torch.Tensor] = []

        def check(
            rows: list[tuple[int, int]],
            got: torch.Tensor,
            seen: list[tuple[int, int]] = seen,
            results: list[torch.Tensor] = results,
        ) -> None:
            assert got.dtype == torch.float32
            assert got.shape == (len(rows), 311)
            seen.extend(rows)
            results.append(got)

        # a whole prompt; then three sequences mixed: decodes, chunks across block borders, one without logits
        check([(0, 39)], run(runner, SequenceChunk(first[:40], 0, tables[0])))
        mixed = (
            SequenceChunk(first[40:41], 40, tables[0]),
            SequenceChunk(second[:37], 0, tables[1], wants_logits=False),
            SequenceChunk(third[:1], 0, tables[2]),
        )
        check([(0, 40), (2, 0)], run(runner, *mixed))
        mixed = (
            SequenceChunk(second[37:90], 37, tables[1]),
            SequenceChunk(third[1:6], 1, tables[2]),
            SequenceChunk(first[41:42], 41, tables[0]),
        )
        check([(1, 89), (2, 5), (0, 41)], run(runner, *mixed))
        for position in (42, 43, 44):
            got = run(runner, SequenceChunk([first[position]], position, tables[0]))
            check([(0, position)], got)
        assert run(runner, SequenceChunk(third[6:50], 6, tables[2], wants_logits=False)).shape == (0, 311)
        index = torch.tensor(seen).T
        got, truth, theirs = torch.cat(results), want[*index], plain[*index]
        if dtype == "float32":
            assert (got - truth).abs().max().item() <= TOLERANCE, name
        else:
            ratio = ((got - truth).norm() / (theirs - truth).norm()).item()
            assert ratio <= MAX_ERROR_RATIO, name


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_equal_generate(engine: str, tmp_path: Path) -> None:
    reference = save(FAMILIES["qwen3"], tmp_path)
    prompt = list(range(5, 30))
    want = reference.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    runner = ModelRunner.load(ModelConfig(path=tmp_path), ENGINES[engine])
    table, tokens, computed = list(range(10, 20)), list(prompt), 0
    for _ in range(40):
        logits = run(runner, SequenceChunk(tokens[computed:], computed, table))
        computed = len(tokens)
        tokens.append(int(logits[0].argmax()))
    assert tokens == want


def test_keys_and_values_of_a_layer_are_in_the_pool_when_it_is_announced(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    for engine in ENGINES.values():
        runner = ModelRunner.load(ModelConfig(path=tmp_path), engine)
        blocks = torch.tensor([7, 3])
        announced: list[Any] = []

        def on_layer(
            layer: int, runner: ModelRunner = runner, blocks: torch.Tensor = blocks, out: list[Any] = announced
        ) -> None:
            out.append((layer, runner.pool.read(blocks, range(layer, layer + 1), range(20))))

        runner.forward(runner.batch([SequenceChunk(list(range(20)), 0, blocks.tolist())]), on_layer)
        assert [layer for layer, _ in announced] == [0, 1, 2]
        for layer, frame in announced:
            assert frame.abs().amax(-1).min() > 0, "every token's key and value was written"
            assert torch.equal(frame, runner.pool.read(blocks, range(layer, layer + 1), range(20)))


def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    logits, versions = [], []
    for seed in (1, 1, 2):
        model = ModelConfig(path=tmp_path / "config.json", load_format="dummy", seed=seed)
        runner = ModelRunner.load(model, ENGINES["fused"])
        logits.append(run(runner, SequenceChunk([1, 2, 3], 0, [0])))
        versions.append(runner.info.weights_version)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert versions[0] == versions[1] != versions[2]


def test_info_tells_what_the_checkpoint_is(tmp_path: Path) -> None:
    FAMILIES["qwen3"].save_pretrained(tmp_path)
    reference = save(FAMILIES["qwen3"], tmp_path)
    reference.generation_config.eos_token_id = [7, 9]
    reference.save_pretrained(tmp_path)
    stages: list[tuple[str, float]] = []
    runner = ModelRunner.load(
        ModelConfig(path=tmp_path, served_name="q"), ENGINES["fused"], lambda stage, part: stages.append((stage, part))
    )
    info = runner.info
    assert (info.name, info.vocab_size, info.max_model_len, info.eos_token_ids) == ("q", 311, 256, (7, 9))
    assert (info.dtype, info.num_layers, info.num_heads, info.num_kv_heads, info.head_dim) == ("float32", 3, 4, 2, 32)
    assert runner.pool.layout.weights_version == info.weights_version
    assert [part for _, part in stages] == sorted(part for _, part in stages)
    assert stages[-1] == ("loaded", 1.0)
    small = EngineConfig(num_blocks=4, num_threads=1)
    assert ModelRunner.load(ModelConfig(path=tmp_path), small).info.max_model_len == 64
    weights = tmp_path / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    again = ModelRunner.load(ModelConfig(path=tmp_path), ENGINES["fused"])
    assert again.info.weights_version != info.weights_version


@pytest.mark.parametrize("broken", ["down", "qkv"], ids=["hidden states", "keys and values"])
def test_a_fused_layer_that_differs_is_not_used(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = fused.FusedLayer.__init__

    def build_wrongly(self: Any, module: Any, layer_idx: int) -> None:
        build(self, module, layer_idx)
        product = getattr(self, broken)
        setattr(self, broken, lambda x: product(x) * 1.01)

    reference = save(FAMILIES["llama"], tmp_path)
    monkeypatch.setattr(fused.FusedLayer, "__init__", build_wrongly)
    runner = ModelRunner.load(ModelConfig(path=tmp_path), ENGINES["fused"])
    assert not runner.fused
    assert "fused layers are not exact" in caplog.text
    assert runner.pool.kv.abs().sum() == 0
    with torch.inference_mode():
        want = reference(torch.tensor([[3, 1, 4]])).logits[0, -1:]
    got = run(runner, SequenceChunk([3, 1, 4], 0, [1]))
    assert (got - want).abs().max().item() <= TOLERANCE
