"""Configuration errors are one line and name the dotted path."""

from pathlib import Path

import pytest
from pydantic import Field

from core.config import ConfigModel, load_config
from core.errors import ConfigError


class Inner(ConfigModel):
    size_tokens: int = Field(16, ge=1)


class Outer(ConfigModel):
    name: str
    inner: Inner = Inner()


CASES = [
    pytest.param("name: a\ninner: {size_token: 3}", "inner.size_token: unknown key", id="unknown nested key"),
    pytest.param("name: a\ninner: {size_tokens: 0}", "inner.size_tokens: Input should be greater", id="range"),
    pytest.param("inner: {}", "name: Field required", id="missing"),
    pytest.param("name: a\nextra: 1\nmore: 2", "(and 1 more)", id="counts the rest"),
    pytest.param("name: [", "is not YAML", id="broken yaml"),
    pytest.param("- 1", "(top level)", id="not a mapping"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_problem_is_named_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read: No such file"):
        load_config(Outer, tmp_path / "nowhere.yaml")


def test_a_good_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("name: a\ninner: {size_tokens: 8}")
    assert load_config(Outer, path) == Outer(name="a", inner=Inner(size_tokens=8))
