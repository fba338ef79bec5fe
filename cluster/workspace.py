"""The temporary folder of one launch, and the mark that all its processes carry.

The folder holds Redis's and Ray's sockets and logs. Its name tells the owner's pid and start time, so that a later
launch can remove what a launcher left that was killed. The mark is an environment variable that every descendant
inherits: it finds the processes of a launch even when their parent is gone.
"""

import contextlib
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


@contextlib.contextmanager
def workspace() -> Iterator[tuple[Path, str]]:
    """Yield a fresh folder and the mark of this launch, set in our environment meanwhile; both go in the end."""
    _sweep()
    mark = secrets.token_hex(4)
    owner = psutil.Process()
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{owner.pid}-{int(owner.create_time())}-{mark}"
    folder.mkdir(mode=0o700)
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
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
    """Remove folders whose owner is dead."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*-*"):
        pid, _, rest = folder.name.removeprefix(_PREFIX).partition("-")
        created = rest.partition("-")[0]
        if pid.isdigit() and created.isdigit() and not is_alive(int(pid), int(created)):
            shutil.rmtree(folder, ignore_errors=True)
