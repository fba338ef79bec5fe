"""Gates: how an event loop ends another thread's access to a KV pool, for good, without waiting for it."""

import threading
from collections.abc import Callable


class Gate:
    """Admits accesses until it is closed; tells when the last one is over.

    Concurrency: all methods from any thread; none blocks. Once `close` has called back, no access is in progress and
    none will be admitted: the blocks behind the gate may change their owner.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._is_closed = False
        self._on_empty: list[Callable[[], object]] = []

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def enter(self) -> bool:
        """Return whether the access may begin; then `leave` must follow."""
        with self._lock:
            if self._is_closed:
                return False
            self._num_inside += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside or not self._is_closed:
                return
            waiting, self._on_empty = self._on_empty, []
        for callback in waiting:
            callback()

    def close(self, on_empty: Callable[[], object]) -> None:
        """Admit nothing more; call `on_empty` when nobody is inside: now, or on the thread that leaves last."""
        with self._lock:
            self._is_closed = True
            if self._num_inside:
                self._on_empty.append(on_empty)
                return
        on_empty()
