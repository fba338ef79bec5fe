"""Loops are compiled once and kept, until anything changes that they are made of."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import sys
from core.compiled import compiled
from loops.parts import STEP, twice

@compiled
def total(count):
    found = 0
    for at in range(count):
        found += twice(at) + STEP
    return found

print(total(10), sum(total.stats.cache_hits.values()))
"""
PARTS = """
from core.compiled import inner

STEP = {step}

@inner
def twice(at):
    return {factor} * at
"""


def run(folder: Path, *, step: int = 0, factor: int = 2) -> tuple[int, int]:
    """Return what the loop says, and how often it came from the disk."""
    package = folder / "loops"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "loop.py").write_text(LOOP)
    (package / "parts.py").write_text(PARTS.format(step=step, factor=factor))
    command = [
        sys.executable,
        "-B",
        "-c",
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; import loops.loop",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    value, hits = map(int, done.stdout.split())
    return value, hits


def test_what_was_compiled_is_kept(tmp_path: Path) -> None:
    assert run(tmp_path) == (90, 0)
    assert run(tmp_path) == (90, 1)


@pytest.mark.parametrize("change", [{"factor": 3}, {"step": 1}], ids=["function", "constant"])
def test_a_change_in_another_file_of_the_folder_compiles_anew(tmp_path: Path, change: dict[str, int]) -> None:
    assert run(tmp_path) == (90, 0)
    assert run(tmp_path, **change) == (90 + 45 * (change.get("factor", 2) - 2) + 10 * change.get("step", 0), 0)
