"""The launcher in a session of its own, so that nobody signals Ray's daemons over its head.

The terminal's Ctrl-C, `timeout` and service managers signal a whole process group. Ray's daemons stay in the group of
whoever starts them and die of it at once, and Ray then waits for them for a minute. So the called process forks: the
child leads a new session and becomes the launcher; the parent stays in the group, passes the signals on to the launcher
alone and leaves with its exit code. Should the parent itself be killed, the launcher is asked to stop.
"""

import contextlib
import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def enter_own_session() -> None:
    """Return in the launcher, which has all of its life before it; the calling process waits for it and exits.

    Until the launcher sets handlers of its own, every signal of `SIGNALS` is a KeyboardInterrupt in it. To be called
    from the main thread, with no other thread running: this forks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    called = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until both sides can handle them
    launcher = os.fork()
    if launcher:
        sys.exit(_stand_for(launcher))
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _like_ctrl_c)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != called:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _like_ctrl_c(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)  # for which asyncio has an orderly end


def _stand_for(launcher: int) -> int:
    """Pass signals on until the launcher ends. Returns the exit code."""

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher, number)

    for number in SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _, status = os.waitpid(launcher, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # nobody is left to pass them on to
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        print(f"error: the launcher was killed by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    return code
