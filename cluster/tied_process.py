"""Starting a subprocess that cannot outlive us.

Linux sends a chosen signal to a process when its parent's thread dies (PR_SET_PDEATHSIG). The child has to ask for it
itself, so it is started through a few lines of Python that ask and then become the program. Not `preexec_fn`, which may
deadlock in a process with threads, and we have Ray's.
"""

import asyncio
import os
import sys
from collections.abc import Sequence

_BECOME = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


async def spawn_tied(command: Sequence[str], *, stderr: int) -> asyncio.subprocess.Process:
    """Start `command` (its first word is a path) in a session of its own, deaf to the terminal's Ctrl-C.

    Raises:
        OSError: it cannot be started.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command,
        stdin=asyncio.subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True,
    )  # fmt: skip
