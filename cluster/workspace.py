"""The temporary folder of one launch, and the mark that all its processes carry.

The folder holds Redis's and Ray's sockets and logs, and a lock that its launcher holds while it lives, so that a later
launch can remove what a killed one left. The mark is an environment variable that every descendant inherits: it finds
the processes of a launch even when their parent is gone.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "TANDEM_LAUNCH"
GONE = frozenset({psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
"""States of a process that holds nothing any more."""
_PREFIX = "tandem-"
_LOCK = "launcher.lock"


@contextlib.contextmanager
def workspace() -> Iterator[tuple[Path, str]]:
    """Yield a fresh folder and the mark of this launch, set in our environment meanwhile; both go in the end."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    mark = secrets.token_hex(8)
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder, mark
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
        shutil.rmtree(folder, ignore_errors=True)  # a dying process may still write its last log line


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the living processes, ourselves excluded, that a launch started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if is_ours and process.status() not in GONE:
                found.append(process)
    return found


def end_marked(mark: str, deadline_s: float) -> list[psutil.Process]:
    """Kill what is left of a launch; return what survives even that. Blocking, at most `deadline_s`."""
    left = marked_processes(mark)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, alive = psutil.wait_procs(left, timeout=deadline_s)
    return alive


def is_alive(pid: int, created_s: float) -> bool:
    """Tell whether the process that had `pid` at its start time still runs; process numbers are used again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created_s) < 1.5 and process.status() not in GONE
    except psutil.Error:
        return False


def _sweep() -> None:
    """Remove folders whose launcher is dead: nobody holds their lock any more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("r") as handle:  # held, or somebody else's
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
