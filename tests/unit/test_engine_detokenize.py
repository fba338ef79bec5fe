"""The checkpoint's tokenizer inside the engine: stop strings of real text."""

from pathlib import Path

import pytest

from core.errors import ConfigError
from core.ids import RequestId
from core.request import Finish, FinishReason, GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.detokenize import load_detokenizer
from engine.engine import Engine
from tests.fake_model import run_to_end, token_ids
from tests.model_matrix import TINY_PATH


def test_a_stop_string_ends_real_text() -> None:
    new_detokenizer = load_detokenizer(TINY_PATH)
    assert new_detokenizer is not None
    stages: list[float] = []
    engine = Engine.load(
        ModelConfig(path=TINY_PATH),
        EngineConfig(num_blocks=32),
        progress=lambda stage, fraction: stages.append(fraction),
    )
    assert stages == sorted(stages)
    assert stages[-1] == 1.0

    def generate(name: str, stop: tuple[str, ...]) -> tuple[str, Finish | None]:
        params = SamplingParams(temperature=0.0, max_tokens=40, stop=stop, ignore_eos=True)
        engine.add(GenerateRequest(RequestId(name), (5, 6, 7, 8), params))
        outputs = run_to_end(engine)[name]
        return new_detokenizer(()).push(token_ids(outputs)), outputs[-1].finish

    text, finish = generate("all", ())
    assert finish == Finish(FinishReason.LENGTH)
    stop = text[len(text) // 2 : len(text) // 2 + 5]  # borders of tokens do not matter
    stopped, finish = generate("stopped", ("never seen", stop))
    assert finish == Finish(FinishReason.STOP, stop)
    assert stopped.count(stop) == 1
    assert text.startswith(stopped)
    assert len(stopped) < len(text)


def test_no_tokenizer_is_no_decoder(tmp_path: Path) -> None:
    assert load_detokenizer(tmp_path) is None


def test_a_broken_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_detokenizer(tmp_path)
