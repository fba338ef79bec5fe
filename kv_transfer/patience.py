"""Scheduling of threads that must not preempt whoever wakes them: those of gloo links, and codec threads.

A codec thread is woken by the thread that moves the bytes, and would take its core. gloo's I/O thread only tries the
lock of its connection: while another thread holds it, to post a message, the I/O thread spins on epoll until it is
free. Posting wakes the peer's I/O thread; when that one preempts the poster on its core, the lock stays held for a
whole time slice, and the spinning burns the core that should have moved bytes: 0.35 ms of system time per message were
measured on two cores. SCHED_BATCH threads do not preempt on wake-up, need no privilege to be, and hand the policy to
the threads that they start, so it is enough that the owner of a link says so before it opens it. Messages of 256 KiB
went from 0.41 to 0.09 ms each (ADR 3).
"""

import contextlib
import os


def be_patient() -> None:
    """Make the calling thread, and every thread that it will start, wait for its turn when it is woken."""
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return  # whoever chose another policy meant it
    with contextlib.suppress(OSError):  # a sandbox may forbid it; then links are slower, not wrong
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
