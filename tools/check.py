"""Everything that a change must pass before it is shown to anybody, in parallel; `make check` runs it.

Format, lint, types, import layers, stub drift, and the quick tests (unit and contract, without those marked slow). Each
check is a command that can be run alone; the output of a failing one is printed whole.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    arguments: tuple[str, ...]


CHECKS = (
    Check("tests", ("-m", "pytest", "-q", "-m", "not slow", "tests/unit", "tests/contract")),
    Check("types", ("-m", "mypy")),
    Check("format", ("-m", "ruff", "format", "--check", ".")),
    Check("lint", ("-m", "ruff", "check", ".")),
    Check("layers", ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")),
    Check("stubs", ("-m", "tools.protos", "--check")),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    check: Check
    seconds: float
    returncode: int
    output: str


def run(check: Check) -> Outcome:
    """Run one check to its end or its deadline."""
    started = time.monotonic()
    # One thread per process: the checks share the cores, and a pool each would only make them wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *check.arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        returncode, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        returncode, output = 1, f"not done after {DEADLINE_S:.0f} s"
    return Outcome(check, time.monotonic() - started, returncode, output)


def main() -> int:
    failed = False
    with ThreadPoolExecutor(max_workers=2) as pool:
        for outcome in pool.map(run, CHECKS):
            verdict = "ok" if outcome.returncode == 0 else "FAILED"
            print(f"{outcome.check.name:8} {verdict:7} {outcome.seconds:6.1f} s", flush=True)
            if outcome.returncode != 0:
                failed = True
                print(outcome.output, flush=True)
            elif outcome.check.name == "tests":
                print(outcome.output.strip().splitlines()[-1], flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
