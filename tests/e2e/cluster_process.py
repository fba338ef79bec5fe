"""A real cluster in processes of its own, started by the real command; what it prints is its stream of events."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import yaml

from cluster.run_file import RunRecord, read
from cluster.workspace import folder_of, marked_processes
from tandem_client import Client, ClusterStatus

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
PATIENCE_S = 100.0  # a deadline for a busy machine, not a duration
READY = re.compile(r"(?P<name>[\w-]+): ready at (?P<address>\S+) \(pid (?P<pid>\d+), epoch (?P<epoch>\d+)\)")


def tiny_config(name: str, *, replicas: int = 2, **changes: object) -> dict[str, object]:
    """Return a small cluster on tandem-tiny in float32; prompts longer than 64 tokens are computed in chunks."""
    engine = {"kv_cache_bytes": 32 * 2**20, "max_batch_tokens": 64}
    pool = {"replicas": replicas, "engine": engine}
    return {
        "name": name,
        "model": {"path": str(TINY), "dtype": "float32"},
        "prefill": pool,
        "decode": pool,
        "router": {"port": 0},
        "supervision": {"drain_deadline_s": 1.0, "back_off": {"base_s": 0.05}},
    } | changes


class ClusterProcess:
    """`tandem up` as a subprocess. `pids` and `epochs` follow its restarts as `until_line` reads about them."""

    def __init__(self, name: str, folder: Path, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        self.name = name
        self.folder = folder
        self.process = process
        self.address = ""
        self.pids: dict[str, int] = {}
        self.epochs: dict[str, int] = {}
        self.lines: list[str] = []
        self._stdout = process.stdout

    async def until_line(self, wanted: Callable[[str], bool]) -> str:
        """Read on until a line pleases; fails with all that was printed when the process ends before."""
        async with asyncio.timeout(PATIENCE_S):
            while line := (await self._stdout.readline()).decode():
                self.lines.append(line)
                if match := READY.match(line):
                    self.pids[match["name"]] = int(match["pid"])
                    self.epochs[match["name"]] = int(match["epoch"])
                if wanted(line):
                    return line
        raise AssertionError("the launcher ended:\n" + "".join(self.lines))

    async def until_restarted(self, name: str) -> None:
        """Wait until `name` is ready under a newer epoch than the last one read."""
        old = self.epochs[name]
        await self.until_line(lambda line: self.epochs[name] > old)

    def kill(self, name: str) -> None:
        os.kill(self.pids[name], signal.SIGKILL)

    @contextlib.contextmanager
    def nobody_restarted(self) -> Iterator[None]:
        """Hold the launcher: who dies meanwhile stays dead, however long a busy machine takes over it."""
        launcher = self.record.pid
        os.kill(launcher, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(launcher, signal.SIGCONT)

    @property
    def record(self) -> RunRecord:
        found = read(next((self.folder / "tandem").glob("*.json")))
        assert found is not None
        return found

    async def status(self) -> ClusterStatus:
        async with Client(self.address) as client:
            return await client.status()

    async def until_status(self, holds: Callable[[ClusterStatus], bool]) -> ClusterStatus:
        """Ask until the answer pleases; the service offers no watch."""
        status = None
        try:
            async with asyncio.timeout(20.0), Client(self.address) as client:
                while True:
                    status = await client.status()
                    if holds(status):
                        return status
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"never held; last seen: {status}") from None


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"XDG_RUNTIME_DIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_config(folder: Path, config: dict[str, object]) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def tandem(folder: Path, *arguments: str) -> tuple[int, list[str], list[str]]:
    """Run the command to its end. Returns exit code, lines of standard output, lines of standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster", *arguments,
        env=environment(folder), cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode().splitlines(), err.decode().splitlines()


@contextlib.asynccontextmanager
async def running_cluster(folder: Path, config: dict[str, object]) -> AsyncIterator[ClusterProcess]:
    """Yield a cluster that is ready. In the end it must stop by itself on SIGTERM, and leave nothing running."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster", "up", "-f", str(write_config(folder, config)),
        env=environment(folder), cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    cluster = ClusterProcess(str(config["name"]), folder, process)
    mark = ""
    try:
        line = await cluster.until_line(lambda line: " is ready at " in line)
        cluster.address = line.split()[-1]
        mark = cluster.record.mark
        assert marked_processes(mark), "the mark does not reach the processes"
        yield cluster
        process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            rest = (await cluster._stdout.read()).decode()
            assert await process.wait() == 0, "".join(cluster.lines) + rest
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if mark:
            await until_nothing_is_left(mark)


async def until_nothing_is_left(mark: str) -> None:
    """Wait for the last process of a launch, and for its folder, which goes last."""
    async with asyncio.timeout(20.0):
        while marked_processes(mark) or folder_of(mark).exists():  # noqa: ASYNC110 - nobody is left who could tell
            await asyncio.sleep(0.1)
