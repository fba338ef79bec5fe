"""`tandem up` when something is wrong: one line says what, the exit code says so too, and nothing is left running."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.workspace import MARK
from tests.e2e.cluster_process import PATIENCE_S, TINY, environment, tandem, tiny_config, write_config

pytestmark = [pytest.mark.slow]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def refusal(folder: Path, config: dict[str, object]) -> str:
    """Bring up what cannot come up. Returns the one line on standard error."""
    code, _, err = await tandem(folder, "up", "-f", str(write_config(folder, config)))
    assert code == 1
    assert len(err) == 1, err
    assert _left_of(folder) == []
    return err[0]


def _left_of(folder: Path) -> list[str]:
    """Run files, and marked processes whose environment points to this test's run folder, whatever their mark is."""
    found = [str(path) for path in folder.glob("tandem/*.json")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"XDG_RUNTIME_DIR={folder}".encode() in environment and any(
                item.startswith(f"{MARK}=".encode()) for item in environment
            ):
                found.append(entry.name)
    return found


async def test_no_file(tmp_path: Path) -> None:
    code, _, err = await tandem(tmp_path, "up", "-f", "none.yaml")
    assert (code, err) == (1, ["error: none.yaml: cannot read: No such file or directory"])


async def test_unknown_key(tmp_path: Path) -> None:
    config = tiny_config("bad") | {"prefill": {"engine": {"blocksize": 16}}}
    assert await refusal(tmp_path, config) == f"error: {tmp_path}/cluster.yaml: prefill.engine.blocksize: unknown key"


async def test_missing_model(tmp_path: Path) -> None:
    config = tiny_config("bad") | {"model": {"path": "nowhere"}}
    assert await refusal(tmp_path, config) == f"error: model.path: {tmp_path}/nowhere does not exist"


async def test_busy_port(tmp_path: Path, taken_port: int) -> None:
    config = tiny_config("bad") | {"router": {"port": taken_port}}
    wanted = f"error: router.port: cannot listen on 127.0.0.1:{taken_port}: Address already in use"
    assert await refusal(tmp_path, config) == wanted


async def test_no_redis(tmp_path: Path, unused_tcp_port: int) -> None:
    config = tiny_config("bad") | {"redis": {"url": f"redis://:pw@127.0.0.1:{unused_tcp_port}/0"}}
    line = await refusal(tmp_path, config)
    assert line.startswith(f"error: redis.url: Redis at 127.0.0.1:{unused_tcp_port}: ")
    assert "pw@" not in line


async def test_no_ray(tmp_path: Path, unused_tcp_port: int) -> None:
    config = tiny_config("bad") | {"ray": {"address": f"127.0.0.1:{unused_tcp_port}"}}
    line = await refusal(tmp_path, config)
    assert line.startswith(f"error: ray.address: cannot reach 127.0.0.1:{unused_tcp_port}: ")


async def test_too_many_cpus(tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    config = tiny_config("bad") | {"prefill": {"replicas": 3, "resources": {"num_cpus": 1000}}}
    wanted = f"error: resources: not enough CPUs: asked for 3000 (prefill 3000), this machine has {cpus}"
    assert await refusal(tmp_path, config) == wanted


async def test_a_model_that_the_workers_refuse(tmp_path: Path) -> None:
    """Found out by the workers in their own processes; the cause comes through in their words."""
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).write_bytes(b"{}" if file.name == "config.json" else file.read_bytes())
    config = tiny_config("bad", replicas=1) | {"model": {"path": str(model)}}
    line = await refusal(tmp_path, config)
    assert line.startswith("error: ")
    assert "config.json" in line or "model" in line


async def test_a_signal_while_starting(tmp_path: Path) -> None:
    """Workers are loading: nothing is worth waiting for."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster", "up", "-f", str(write_config(tmp_path, tiny_config("bad"))),
        env=environment(tmp_path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        while b"decode-1: starting" not in await process.stdout.readline():
            assert process.returncode is None
        process.terminate()
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode() == "error: interrupted while starting; nothing is left running\n"
    assert _left_of(tmp_path) == []


@pytest.mark.parametrize("moment", ["connecting to Ray", "decode-1: starting"])
async def test_ctrl_c_of_the_terminal_while_starting(tmp_path: Path, moment: str) -> None:
    """It goes to the whole process group, which Ray's daemons must not be in."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster", "up", "-f", str(write_config(tmp_path, tiny_config("bad"))),
        env=environment(tmp_path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(30.0):  # Ray's own patience with dead daemons is a minute
        while moment.encode() not in await process.stdout.readline():
            assert process.returncode is None
        os.killpg(process.pid, signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode() == "error: interrupted while starting; nothing is left running\n"
    assert _left_of(tmp_path) == []


@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
async def test_the_death_of_ray_ends_the_launch(tmp_path: Path, daemon: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster", "up", "-f", str(write_config(tmp_path, tiny_config("lost", replicas=1))),
        env=environment(tmp_path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        while b" is ready at " not in await process.stdout.readline():
            assert process.returncode is None
    children = psutil.Process(process.pid).children(recursive=True)
    [victim] = [child for child in children if child.name() == daemon]
    victim.kill()
    async with asyncio.timeout(30.0):
        _, err = await process.communicate()
    assert process.returncode == 1
    # asyncio may say before that it found a child reaped by somebody else (Ray's own code does that)
    assert err.decode().splitlines()[-1] == f"error: ray: its {daemon} died; everything was taken down"
    assert "Traceback" not in err.decode()
    assert _left_of(tmp_path) == []
