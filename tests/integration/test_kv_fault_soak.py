"""The soak in small: 300 transfers with random faults, over real gRPC and shared memory; nothing may be left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_transfers_with_random_faults_leave_nothing_behind() -> None:
    command = [sys.executable, "-m", "benchmarks.kv_soak", "--transfers", "300", "--batch", "100", "--seed", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--carrier", "shm", "--control", "grpc"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    assert summary["violations"] == []
    assert done.returncode == 0
    assert summary["transfers"] == 380
    assert sum(summary["faults"].values()) >= 60  # faults did happen, of many kinds
    assert len(summary["faults"]) >= 20
    assert summary["outcomes"]["acked/landed"] >= 150
