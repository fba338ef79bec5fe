"""The temporary folder of one launch, the mark that its processes carry, and the reaper that sees to their end.

The folder holds Redis's and Ray's sockets and logs. The mark is part of its name, and an environment variable that
every descendant inherits: a process belongs to the launch if it has the variable, or an open file in the folder (a
process that changes its title, as Ray's do, may wipe its environment). The reaper (`cluster.reaper`) is a small process
that waits for the launcher's end, whatever that end is, kills what is left of the launch, and removes the folder.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "TANDEM_LAUNCH"
GONE = frozenset({psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
"""States of a process that holds nothing any more."""
_PREFIX = "tandem-"
_REAPER_S = 15.0


@contextlib.contextmanager
def workspace() -> Iterator[tuple[Path, str]]:
    """Yield a fresh folder and the mark of this launch, set in our environment meanwhile.

    In the end every process of the launch is killed and the folder is removed, also when we ourselves are killed.
    """
    mark = secrets.token_hex(8)
    folder = folder_of(mark)
    folder.mkdir(mode=0o700)
    packages = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get(MARK)
    environment = {name: value for name, value in os.environ.items() if name != MARK} | {"PYTHONPATH": packages}
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.reaper", mark], env=environment, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as reaper:  # fmt: skip
        os.environ[MARK] = mark
        try:
            yield folder, mark
        finally:
            if before is None:
                del os.environ[MARK]
            else:
                os.environ[MARK] = before
            assert reaper.stdin is not None, "a pipe was asked for"
            reaper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                reaper.wait(_REAPER_S)


def folder_of(mark: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{mark}"


def marked_processes(mark: str, *, spared: int = 0) -> list[psutil.Process]:
    """Return the living processes of a launch, ourselves and process `spared` excluded.

    The launcher has files open in the folder too: whoever asks on its behalf spares it.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in (os.getpid(), spared) or process.status() in GONE:
                continue
            if _is_marked(process, mark):
                found.append(process)
    return found


def end_marked(mark: str, deadline_s: float, *, spared: int = 0) -> list[psutil.Process]:
    """Kill what is left of a launch; return what survives even that. Blocking, at most `deadline_s`."""
    left = marked_processes(mark, spared=spared)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, alive = psutil.wait_procs(left, timeout=deadline_s)
    return [process for process in alive if process.is_running() and process.status() not in GONE]


def end_session(leader: int) -> None:
    """Kill what is left of the session of a dead launcher, bar ourselves."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and os.getsid(process.pid) == leader:
                process.kill()


def is_alive(pid: int, created_s: float) -> bool:
    """Tell whether the process that had `pid` at its start time still runs; process numbers are used again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created_s) < 1.5 and process.status() not in GONE
    except psutil.Error:
        return False


def _is_marked(process: psutil.Process, mark: str) -> bool:
    if process.environ().get(MARK) == mark:
        return True
    inside = f"/{_PREFIX}{mark}/"
    open_files = f"/proc/{process.pid}/fd"
    return any(inside in os.readlink(f"{open_files}/{number}") for number in _listed(open_files))


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except PermissionError:  # another user's process
        return []
