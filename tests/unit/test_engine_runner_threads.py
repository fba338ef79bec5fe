"""Small steps run on one thread, large ones on all; the choice is a pure function of the model and the tokens."""

from threading import Thread

import torch
from transformers import LlamaConfig

from engine.config import EngineConfig, ModelConfig
from engine.forward import SequenceChunk
from engine.runner import ModelRunner
from engine.threads import StepCost

TINY = StepCost(num_weights=4_000_000, weight_bytes=8_000_000, num_layers=4, dtype="bfloat16")
LARGE = StepCost(num_weights=8_000_000_000, weight_bytes=16_000_000_000, num_layers=32, dtype="bfloat16")


def test_small_steps_take_one_thread_and_large_ones_all() -> None:
    assert TINY.threads(1, 8) == TINY.threads(16, 8) == 1
    assert TINY.threads(2048, 8) == 8
    assert LARGE.threads(1, 8) == 8


def test_more_tokens_never_take_fewer_threads() -> None:
    chosen = [TINY.threads(tokens, 8) for tokens in range(1, 2000)]
    assert chosen == sorted(chosen)


def test_logits_do_not_depend_on_the_number_of_threads_or_the_calling_thread(tmp_path) -> None:  # type: ignore[no-untyped-def]
    LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path)
    model = ModelConfig(path=tmp_path, load_format="dummy")
    before = torch.get_num_threads()
    results, counts = [], []

    def compute(runner: ModelRunner) -> None:
        results.append(runner.forward(runner.batch([SequenceChunk(list(range(100)) * 8, 0, list(range(50)))])))
        counts.append(torch.get_num_threads())

    try:
        for num_threads in (1, 2):
            runner = ModelRunner.load(model, EngineConfig(num_blocks=50, num_threads=num_threads))
            thread = Thread(target=compute, args=(runner,))
            thread.start()
            thread.join(60)
            compute(runner)
    finally:
        torch.set_num_threads(before)
    assert counts == [1, 1, 2, 2]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=0)
