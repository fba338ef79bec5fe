"""`tandem bench --simulate` on a recording of a few seconds."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from core.errors import ConfigError


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    rng = random.Random(1)
    rows = [
        {
            "timestamp": 200 * number,
            "input_length": 2000 + (size := rng.randrange(500)),
            "output_length": 5 + size % 40,
            "hash_ids": [0, 1, 2, 1000 * number + 3, 1000 * number + 4][: -(-(2000 + size) // 512)],
        }
        for number in range(60)
    ]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_policies_are_compared(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    options = ["--policy", "cost", "--policy", "random", "--workers", "2+1", "--seeds", "2", "--output", str(output)]
    result = CliRunner().invoke(
        app, ["bench", "--simulate", "--trace", str(recording), *options], catch_exceptions=False
    )
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("short, replayed at 1x, on 2+1 workers llama70b-a800x8")
    assert "ttft_s" in lines[1]
    assert {line.split("|")[1].strip() for line in lines[3:]} == {"random", "cost"}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["arm"] for row in rows} == {"random", "cost"}
    for row in rows:
        assert row["seeds"] == [0, 1]
        assert row["missed"]["by_seed"] == [0.0, 0.0]
        assert 0 < row["ttft_s"]["mean"] < 5
        assert row["hit_ratio"]["mean"] > 0.2  # three blocks of four are shared


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        pytest.param([], "add --simulate", id="not-simulated"),
        pytest.param(["--simulate", "--workers", "eight"], "prefill\\+decode", id="workers"),
        pytest.param(["--simulate", "--policy", "luck"], "no policy luck", id="policy"),
        pytest.param(["--simulate", "--machine", "abacus"], "no machine 'abacus'", id="machine"),
    ],
)
def test_what_cannot_be_is_refused(recording: Path, options: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        CliRunner().invoke(app, ["bench", "--trace", str(recording), *options], catch_exceptions=False)
