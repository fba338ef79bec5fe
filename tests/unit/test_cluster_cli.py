"""What the command says without a cluster."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app, main

COMMANDS = (
    "up",
    "down",
    "status",
    "generate",
    "explain",
    "bench",
    "demo",
    "config schema",
    "config check",
    "profile decisions",
    "keys create",
    "keys list",
    "keys revoke",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"tandem {command}" in result.output


def test_help_lists_the_commands() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    for command in COMMANDS:
        assert command.split()[0] in output


def test_schema_is_json_and_names_every_section() -> None:
    schema = json.loads(CliRunner().invoke(app, ["config", "schema"]).output)
    assert {"model", "prefill", "decode", "router", "transfer", "redis", "ray", "supervision"} <= set(
        schema["properties"]
    )
    assert schema["required"] == ["model"]


@pytest.mark.parametrize("command", [["status"], ["generate", "x"], ["explain"], ["profile", "decisions"], ["down"]])
def test_without_a_cluster_one_line_says_so(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["tandem", *command])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err == (
        "error: no cluster is up on this machine; start one with `tandem up -f cluster.yaml`\n"
    )
