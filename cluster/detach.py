"""`tandem up --detach` and `tandem down`: a launcher in a session of its own, started and ended by others.

The detached launcher speaks to its starter through a pipe (its standard output and error) until it is ready; then it
turns both to a log file beside the run file, the pipe closes, and the starter knows.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.run_file import RunRecord, run_folder
from cluster.workspace import end_marked
from core.errors import ServingError

DETACHED = "--detached-child"


def log_path(cluster: str) -> Path:
    return run_folder() / f"{cluster}.log"


def start_detached(file: Path, tell: Callable[[str], None]) -> int:
    """Run `up` as a process of its own, passing its words to `tell` until it is ready. Returns an exit code."""
    command = [sys.executable, "-m", "cluster", "up", "-f", str(file.resolve()), DETACHED]
    environment = os.environ | {"PYTHONPATH": _search_path()}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment,
    ) as child:  # fmt: skip
        assert child.stdout is not None, "a pipe was asked for"
        try:
            for line in child.stdout:
                tell(line.rstrip("\n"))
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            return child.wait(60.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.5)  # the pipe closed: it has ended, or
        child.returncode = 0  # it serves, and is nobody's child from here on
        return 0


def become_detached(cluster: str) -> None:
    """Let go of whoever reads our words, as the detached launcher does once ready."""
    log = log_path(cluster).open("ab")
    with log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())


def say(line: str, cluster: str) -> None:
    """Print a line. Once nobody reads any more (the starter was killed, a pager closed), it goes to the log instead:
    a cluster does not stop because its words are not heard."""
    said = f"{line}\n".encode()
    try:
        os.write(sys.stdout.fileno(), said)  # past the buffer: whether that keeps what it could not write differs
    except BrokenPipeError:
        become_detached(cluster)
        os.write(sys.stdout.fileno(), said)


def end_launcher(record: RunRecord, deadline_s: float) -> bool:
    """Ask the launcher to drain and stop; past the deadline kill it and what it launched.

    Returns whether it went by itself.

    Raises:
        ServingError: something survives even that.
    """
    try:
        process = psutil.Process(record.pid)
        process.terminate()
        process.wait(deadline_s)
        graceful = True
    except psutil.NoSuchProcess:
        graceful = True
    except psutil.TimeoutExpired:
        graceful = False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    except psutil.AccessDenied as error:
        raise ServingError(f"may not end process {record.pid} of cluster {record.cluster!r}") from error
    left = end_marked(record.mark, 10.0)
    if left:
        raise ServingError(f"processes survive: {', '.join(str(one.pid) for one in left)}")
    return graceful


def _search_path() -> str:
    """Our packages first, wherever the starter's working directory is."""
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
