"""Threads that encode and decode frames, and the host memory that coded frames wait in.

One set per sender and one per receiver, shared by all their pairs. Everything heavy that runs here (gathers, kernels,
entropy coding) releases the interpreter, so a few frames are coded at a time. Jobs are bounded where they are made: a
pump has at most its look-ahead of them outstanding, and waits for no other pump's.

Memory is lent and comes back: a transfer of many frames touches the same few pages. What is idle is capped.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from kv_transfer.patience import be_patient

_log = logging.getLogger(__name__)
_MAX_IDLE_BYTES = 64 * 1024 * 1024
_GRAIN_BYTES = 64 * 1024


class CodecThreads:
    """A few daemon threads over one queue of jobs; they start with the first job. All methods: any thread."""

    def __init__(self, num_threads: int, name: str) -> None:
        self.num_threads = num_threads
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []
        self._is_closing = False

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job, which must tell its outcome itself. Never blocks.

        Raises:
            RuntimeError: closed; the job will not run.
        """
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the codec threads are closed")
            self._jobs.append(job)
            if len(self._threads) < self.num_threads:
                thread = threading.Thread(target=self._run, name=f"kv-codec-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def close(self, timeout_s: float) -> bool:
        """Run what is queued, end the threads and wait for them. Returns False when one is still in its job."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        be_patient()  # waking up to code a frame must not preempt the thread that moves one
        while True:
            with self._changed:
                # An idle thread waits as long as it takes; `close` is what ends the wait.
                self._changed.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:  # jobs tell their failures themselves; this one had a defect, and the next shall run
                _log.exception("codec job")
            del job  # it holds buffers, and this thread may wait for long


class Buffers:
    """Host memory for coded frames: lent, given back, lent again. All methods: any thread; none blocks."""

    def __init__(self, max_idle_bytes: int = _MAX_IDLE_BYTES) -> None:
        self._lock = threading.Lock()
        self._idle: list[Tensor] = []
        self._idle_bytes = 0
        self._max_idle_bytes = max_idle_bytes
        self._lent_bytes = 0

    @property
    def lent_bytes(self) -> int:
        """What is lent now; zero when nothing is being coded."""
        return self._lent_bytes

    def lend(self, num_bytes: int) -> Tensor:
        """Return uint8 memory of at least `num_bytes`, 64-byte aligned, with whatever was in it before."""
        with self._lock:
            fitting = [buffer for buffer in self._idle if num_bytes <= buffer.numel() <= 4 * num_bytes + _GRAIN_BYTES]
            if fitting:
                buffer = min(fitting, key=Tensor.numel)
                self._idle = [other for other in self._idle if other is not buffer]
                self._idle_bytes -= buffer.numel()
                self._lent_bytes += buffer.numel()
                return buffer
        capacity = max(1, -(-num_bytes // _GRAIN_BYTES)) * _GRAIN_BYTES
        buffer = torch.empty(capacity, dtype=torch.uint8)
        with self._lock:
            self._lent_bytes += capacity
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """Take memory back that `lend` returned, once."""
        with self._lock:
            self._lent_bytes -= buffer.numel()
            if self._idle_bytes + buffer.numel() <= self._max_idle_bytes:
                self._idle.append(buffer)
                self._idle_bytes += buffer.numel()


class Scratch(threading.local):
    """Memory of one thread for the KV that it is coding; grows to the largest frame."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def room(self, num_bytes: int) -> Tensor:
        """Return uint8 memory of at least `num_bytes`, valid until this thread asks again."""
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(-(-num_bytes // _GRAIN_BYTES) * _GRAIN_BYTES, dtype=torch.uint8)
        return self._memory
