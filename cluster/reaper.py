"""`python -m cluster.reaper MARK`: outlives its launcher by a moment, to kill what is left and remove the folder.

It reads its standard input until the end, which comes when the launcher closes it or dies. Ray ties its own processes
to the launcher's life too, but its agents take more than a minute to notice, and for a moment of their start (their
environment wiped, their log not open) they carry no mark: of a launcher that died, its whole session is ended.
"""

import contextlib
import os
import shutil
import signal
import sys

from cluster.workspace import end_marked, end_session, folder_of

_ROUNDS = 3  # a process that was being started during one round is found by the next


def main(mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the launcher
    launcher = os.getppid()
    is_leader = False
    with contextlib.suppress(ProcessLookupError):  # dead already
        is_leader = os.getsid(launcher) == launcher
    sys.stdin.buffer.read()
    if is_leader and os.getppid() != launcher:
        end_session(launcher)
    for _ in range(_ROUNDS):
        end_marked(mark, 3.0, spared=os.getppid())  # the launcher, while it lives; once it is dead, a bystander
    shutil.rmtree(folder_of(mark), ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
