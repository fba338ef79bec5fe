"""The link benchmark runs, small: every side of every carrier, and without NIXL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_carrier_is_measured_beside_its_raw_send() -> None:
    small = "--no-nixl --goodput-mib 2 --repetitions 2 --warmup 1 --exposed-mib 1 --exposed-repetitions 1"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.link", *small.split(), "--carrier", "shm", "tcp", "gloo"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    goodput = [result for result in results if result["benchmark"] == "link.goodput"]
    assert [result["carrier"] for result in goodput] == ["shm", "tcp", "gloo"]
    for result in goodput:
        assert min(result["raw_gb_s"], result["contiguous_gb_s"], result["hand_off_gb_s"]) > 0
        assert result["nixl_problem"] == "not asked for"
    assert len([result for result in results if result["benchmark"] == "link.exposed"]) == 3
