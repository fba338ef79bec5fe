"""`tandem up --detach`, `down`, a launcher that is killed, and the same YAML on an existing Ray cluster."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from cluster.redis_server import free_ports
from cluster.run_file import RunRecord, read
from cluster.workspace import GONE, end_marked, marked_processes, workspace
from tests.e2e.cluster_process import (
    PATIENCE_S,
    tandem,
    tiny_config,
    until_nothing_is_left,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@contextlib.asynccontextmanager
async def detached(folder: Path, config: dict[str, object]) -> AsyncIterator[RunRecord]:
    """A cluster that goes on alone; whatever the test does, nothing of it outlives the test."""
    code, out, err = await tandem(folder, "up", "--detach", "-f", str(write_config(folder, config)))
    assert (code, err) == (0, []), out
    assert out[-1].startswith(f"cluster {config['name']} is ready at ")
    record = read(folder / "tandem" / f"{config['name']}.json")
    assert record is not None
    assert record.is_alive
    try:
        yield record
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGKILL)
        end_marked(record.mark, 10.0)


async def generates(folder: Path) -> None:
    code, out, err = await tandem(folder, "generate", "def f(", "-t", "0", "-n", "4", "--deadline", "60")
    assert (code, err) == (0, [])
    assert any(out)


async def test_a_killed_launcher_takes_everything_along(tmp_path: Path) -> None:
    async with detached(tmp_path, tiny_config("lone", replicas=1)) as record:
        await generates(tmp_path)
        assert len(marked_processes(record.mark)) > 4
        os.kill(record.pid, signal.SIGKILL)
        await until_nothing_is_left(record.mark)
        code, _, err = await tandem(tmp_path, "status")
        assert code == 1
        assert err == ["error: no cluster is up on this machine; start one with `tandem up -f cluster.yaml`"]


@contextlib.asynccontextmanager
async def existing_ray() -> AsyncIterator[dict[str, str]]:
    """A Ray head node of somebody else's. Yields what clients must have in their environment to be let in."""
    (port,) = free_ports(1)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with workspace() as (folder, _):  # for its end: whatever Ray leaves is killed
        head = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--object-store-memory={80 * 2**20}",
            "--disable-usage-stats", f"--temp-dir={folder}",
            env=os.environ | settings, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert head.stdout is not None
        printed = b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while b"Ray runtime started" not in printed:
                    line = await head.stdout.readline()
                    assert line, printed.decode()
                    printed += line
            yield settings
            assert head.returncode is None, "Ray was taken down with the cluster"
        finally:
            with contextlib.suppress(ProcessLookupError):
                head.kill()
            await head.wait()


async def test_joins_an_existing_ray_cluster_and_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with existing_ray() as settings:
        address = settings.pop("RAY_ADDRESS")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        config = tiny_config("guest", replicas=1) | {"ray": {"address": address}}
        async with detached(tmp_path, config) as record:
            await generates(tmp_path)
            code, out, _ = await tandem(tmp_path, "status", "--json")
            assert code == 0
            workers = [psutil.Process(pid) for pid in _pids("\n".join(out))]
            assert len(workers) == 2
            code, out, err = await tandem(tmp_path, "down", "--deadline", "60")
            assert (code, out, err) == (0, ["cluster guest is down"], [])
            assert not record.is_alive
            assert marked_processes(record.mark) == []
            assert not [worker for worker in workers if worker.is_running() and worker.status() not in GONE]


def _pids(text: str) -> list[int]:
    return [worker["pid"] for worker in json.loads(text)["workers"]]
