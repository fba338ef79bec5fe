"""Links inside one process: the slots are handed over, nothing is copied. For tests and colocated workers."""

import threading
from collections import deque

import torch

from kv_transfer.frame import HEADER_BYTES
from kv_transfer.link import LinkError, LinkPlan, ReceiveEnd, SendEnd, Slot


class MemoryHub:
    """Where ends of one process meet by name."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._waiting: dict[str, _Channel] = {}

    def join(self, plan: LinkPlan) -> "_Channel":
        """Return the channel of `plan.name` as soon as both ends asked for it.

        Raises:
            LinkError: the other end did not come in time.
        """
        with self._lock:
            channel = self._waiting.pop(plan.name, None)
            if channel is not None:
                channel.is_joined = True
                self._lock.notify_all()
                return channel
            channel = self._waiting[plan.name] = _Channel(plan)
            if not self._lock.wait_for(lambda: channel.is_joined, plan.open_timeout_s):
                del self._waiting[plan.name]
                raise LinkError(f"{plan.name}: nobody came within {plan.open_timeout_s:g} s")
            return channel


PROCESS_HUB = MemoryHub()
"""Meeting place of all memory links of this process that were not given their own."""


class MemoryLinks:
    """Carrier of the `memory` backend."""

    backend = "memory"

    def __init__(self, hub: MemoryHub = PROCESS_HUB) -> None:
        self._hub = hub

    def host(self) -> str:
        return "memory"

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        return _MemorySendEnd(self._hub.join(plan))

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        return _MemoryReceiveEnd(self._hub.join(plan))

    def close(self) -> None:
        pass


class _Channel:
    """Slots that circulate: free, being filled, full, being read, free."""

    def __init__(self, plan: LinkPlan) -> None:
        self.is_joined = False
        self._changed = threading.Condition()
        self._is_broken = False
        self._free = deque(
            Slot(index, torch.zeros(plan.slot_bytes, dtype=torch.uint8)) for index in range(plan.num_slots)
        )
        self._num_slots = plan.num_slots
        self._full: deque[Slot] = deque()

    def take_free(self, timeout_s: float) -> Slot:
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_broken or self._free, timeout_s):
                self._break()
                raise LinkError(f"no message left within {timeout_s:g} s")
            self._check()
            return self._free.popleft()

    def put_full(self, slot: Slot) -> None:
        with self._changed:
            self._check()
            self._full.append(slot)
            self._changed.notify_all()

    def take_full(self) -> Slot:
        with self._changed:
            # Idle links wait as long as it takes; abort() on either side is what ends the wait.
            self._changed.wait_for(lambda: self._is_broken or self._full)
            self._check()
            return self._full.popleft()

    def put_free(self, slot: Slot) -> None:
        with self._changed:
            self._check()
            self._free.append(slot)
            self._changed.notify_all()

    def wait_all_read(self, timeout_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_broken or not self._full, timeout_s):
                self._break()
                raise LinkError(f"messages were not taken within {timeout_s:g} s")
            self._check()

    def abort(self) -> None:
        with self._changed:
            self._break()

    def _break(self) -> None:
        self._is_broken = True
        self._changed.notify_all()

    def _check(self) -> None:
        if self._is_broken:
            raise LinkError("the link was aborted")


class _MemorySendEnd:
    carrier = "memory"

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    def acquire(self, timeout_s: float) -> Slot:
        return self._channel.take_free(timeout_s)

    def send(self, slot: Slot, num_bytes: int) -> None:
        if not HEADER_BYTES <= num_bytes <= slot.memory.numel():
            raise ValueError(f"a message of {num_bytes} bytes does not fit into a slot")
        self._channel.put_full(slot)

    def flush(self, timeout_s: float) -> None:
        self._channel.wait_all_read(timeout_s)

    def abort(self) -> None:
        self._channel.abort()

    def close(self) -> None:
        self._channel.abort()


class _MemoryReceiveEnd:
    carrier = "memory"

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    def receive(self) -> Slot:
        return self._channel.take_full()

    def release(self, slot: Slot) -> None:
        self._channel.put_free(slot)

    def abort(self) -> None:
        self._channel.abort()

    def close(self) -> None:
        self._channel.abort()
