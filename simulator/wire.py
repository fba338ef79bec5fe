"""Messages that take a while and stay in order; and KV that shares a link."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from simulator.latency import LinkLatency
from simulator.virtual_time import VirtualLoop

T = TypeVar("T")


class Wire(Generic[T]):
    """One direction between two parties: everything arrives `delay_s` after it was sent, in order."""

    def __init__(self, loop: VirtualLoop, delay_s: float, deliver: Callable[[T], object]) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._deliver = deliver
        self._under_way: deque[tuple[float, T]] = deque()

    def send(self, message: T) -> None:
        due_at = self._loop.now() + self._delay_s
        self._under_way.append((due_at, message))
        if len(self._under_way) == 1:
            self._loop.call_at(due_at, self._arrive)

    def _arrive(self) -> None:
        while self._under_way and self._under_way[0][0] <= self._loop.now():
            _, message = self._under_way.popleft()
            self._deliver(message)
        if self._under_way:
            self._loop.call_at(self._under_way[0][0], self._arrive)


class KvLink:
    """What leaves one prefill worker, first come first served: its network card is the narrowest place near by."""

    def __init__(self, latency: LinkLatency) -> None:
        self._latency = latency
        self._free_at = 0.0

    def send(self, num_bytes: int, bytes_per_s: float, *, ready_from: float, ready_at: float) -> float:
        """Return when the last byte has landed.

        Layer by layer: bytes become ready evenly from `ready_from` to `ready_at`, those of the last layer at its end.
        """
        wire_s = num_bytes / bytes_per_s
        started_at = max(self._free_at, ready_from)
        self._free_at = max(started_at + wire_s, ready_at + wire_s / self._latency.num_layers)
        return self._free_at + self._latency.message_s

    def queued_s(self, now: float) -> float:
        """Return for how long what waits keeps it busy."""
        return max(0.0, self._free_at - now)
