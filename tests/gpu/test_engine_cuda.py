"""The engine on a CUDA device, for each model family: the same tokens as transformers on the CPU, in float32."""

from pathlib import Path

import pytest
import torch

from core.ids import RequestId
from core.request import GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from tests import model_matrix
from tests.fake_model import run_to_end, token_ids

NEW_TOKENS = 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.mark.parametrize("family", [*model_matrix.FAMILIES, "tiny"])
def test_greedy_output_equals_transformers(family: str, tmp_path: Path) -> None:
    path = model_matrix.checkpoint(family, tmp_path)
    engine = Engine.load(
        ModelConfig(path=path, dtype="float32", device="cuda"), EngineConfig(num_blocks=128, max_batch_tokens=24)
    )
    prompts = model_matrix.prompts(engine.model_info.vocab_size)
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    for at, prompt in enumerate(prompts):
        engine.add(GenerateRequest(RequestId(f"r{at}"), prompt, greedy))
    outputs = run_to_end(engine)
    expected = model_matrix.generate(path, prompts, NEW_TOKENS)
    assert [token_ids(outputs[f"r{at}"]) for at in range(len(prompts))] == expected
