"""Links over two-rank `torch.distributed` groups that are built directly: no default group, no global ranks.

The receiver of a pair hosts a TCPStore; both ends build the backend object over ``PrefixStore(<plan name>)``; the
sender is rank 0. A name is never used twice, because the keys of a dead group stay in the store.

Two ways to carry a message (ADR 3 has the measurements):

- **slots** (gloo): the receiver posts receives of the whole slot size ahead of time; a message may be shorter than its
  buffer. One gloo message per frame, nothing to wait for. A message LONGER than its buffer would kill the receiving
  process (gloo terminates), so the sender checks, and slot size is agreed on before the group is built.
- **header first** (NCCL, whose two ends must name the same count): the fixed-size header area, then exactly the payload
  that it announces.

Sharp edges of gloo that shape this file: a `wait` that times out breaks the pair for both ends, so an idle receiver
waits without limit; a group cannot be aborted from inside (see `gloo_socket`), so `abort` shuts its connection down;
the store client is locked while one group waits in it for its peer, so every group has a client of its own.

NCCL has not been run: the development machines have no pair of GPUs. It is the same class with device twins of the
slots (checksum and codecs work in host memory), and a posted receive keeps a kernel spinning on its GPU while a link
idles.
"""

import contextlib
import socket
import threading
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, Work

from kv_transfer.carriers.gloo_socket import create_listening, find_connection
from kv_transfer.frame import HEADER_BYTES, FrameRefused, decode_header
from kv_transfer.link import LinkError, LinkPlan, ReceiveEnd, SendEnd, Slot
from kv_transfer.patience import be_patient

GroupBackend = Literal["gloo", "nccl"]
Carriage = Literal["slots", "header_first"]

_SENDER, _RECEIVER = 0, 1
_TAGS = 1 << 20  # outstanding messages are told apart by tag; far more tags than slots
_NO_LIMIT = timedelta(days=30)  # gloo has no endless wait; the end of the connection is what ends one


class _Group(Protocol):
    """What is used of a backend object; torch's own stubs do not show it."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Pair:
    """A group of two, and how to end it from any thread."""

    backend: GroupBackend
    group: _Group
    connection: socket.socket | None  # of gloo

    def end(self) -> None:
        if self.connection is None:
            self.group.abort()
            return
        with contextlib.suppress(OSError):  # not connected any more
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class ProcessGroupLinks:
    """Carrier of the `gloo` and `nccl` backends."""

    def __init__(self, backend: GroupBackend, host: str, *, carriage: Carriage | None = None) -> None:
        """Use the interface of `host` for everything. `carriage` is only for measurements."""
        self.backend = backend
        self._host = host
        self._carriage: Carriage = carriage or ("slots" if backend == "gloo" else "header_first")
        self._store: TCPStore | None = None
        self._store_address = ""

    def host(self) -> str:
        if self._store is None:
            # TCPStore on its own would listen on every interface: it is given a socket bound to ours.
            with socket.create_server((self._host, 0)) as listener:
                port = listener.getsockname()[1]
                self._store = TCPStore(
                    self._host,
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=listener.detach(),
                    use_libuv=False,
                )
            self._store_address = f"{self._host}:{port}"
        return self._store_address

    def open_send(self, address: str, plan: LinkPlan) -> SendEnd:
        return _GroupSendEnd(self._meet(address, _SENDER, plan), self._staging(plan))

    def open_receive(self, plan: LinkPlan) -> ReceiveEnd:
        if self._store is None:
            raise LinkError("nothing is hosted here")
        return _GroupReceiveEnd(self._meet(self._store_address, _RECEIVER, plan), plan, self._staging(plan))

    def close(self) -> None:
        self._store = None

    def _meet(self, address: str, rank: int, plan: LinkPlan) -> _Pair:
        host, _, port = address.rpartition(":")
        timeout = timedelta(seconds=plan.open_timeout_s)
        try:
            client = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
            store = PrefixStore(plan.name, client)
            return self._join_nccl(store, rank, timeout) if self.backend == "nccl" else self._join(store, rank, timeout)
        except (RuntimeError, ValueError) as error:  # DistStoreError and DistBackendError are RuntimeErrors
            raise LinkError(f"{plan.name} at {address}: {_one_line(error)}") from error

    def _join(self, store: Store, rank: int, timeout: timedelta) -> _Pair:
        be_patient()  # the owner's thread, and those that gloo is about to start
        device, own_port = create_listening(lambda: dist.ProcessGroupGloo.create_device(hostname=self._host))
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub calls it Options
        options._devices = [device]
        options._timeout = timeout
        options._threads = 1
        store.set(f"port-{rank}", str(own_port))
        group = cast(_Group, dist.ProcessGroupGloo(store, rank, 2, options))
        peer_port = int(store.get(f"port-{1 - rank}"))
        return _Pair("gloo", group, find_connection(own_port, peer_port))

    def _join_nccl(self, store: Store, rank: int, timeout: timedelta) -> _Pair:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, 2, options)
        group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
        return _Pair("nccl", cast(_Group, group), None)

    def _staging(self, plan: LinkPlan) -> "_Staging":
        return _Staging(plan, is_on_device=self.backend == "nccl", carriage=self._carriage)


class _Staging:
    """The slots of one end, and how their bytes get to where the group can see them."""

    def __init__(self, plan: LinkPlan, *, is_on_device: bool, carriage: Carriage) -> None:
        self.is_header_first = carriage == "header_first"
        # Written once here, so that no page fault falls into a transfer.
        self.slots = [Slot(i, torch.zeros(plan.slot_bytes, dtype=torch.uint8)) for i in range(plan.num_slots)]
        self._twins = [slot.memory.to("cuda") for slot in self.slots] if is_on_device else None

    def seen_by_group(self, slot: Slot) -> Tensor:
        return slot.memory if self._twins is None else self._twins[slot.index]

    def upload(self, slot: Slot, num_bytes: int) -> None:
        if self._twins is not None:
            self._twins[slot.index][:num_bytes].copy_(slot.memory[:num_bytes])

    def download(self, slot: Slot, start: int, stop: int) -> None:
        if self._twins is not None:
            slot.memory[start:stop].copy_(self._twins[slot.index][start:stop])


class _End:
    """What both ends share: a group that any thread may end and that its owner frees."""

    def __init__(self, pair: _Pair) -> None:
        self.carrier = pair.backend
        self._pair: _Pair | None = pair
        self._lock = threading.Lock()
        self._is_aborted = False

    def _live_group(self) -> _Group:
        if self._pair is None or self._is_aborted:
            raise LinkError("the link was aborted")
        return self._pair.group

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted or self._pair is None:
                return
            self._is_aborted = True
            self._pair.end()

    def close(self) -> None:
        self.abort()
        self._pair = None


class _GroupSendEnd(_End):
    def __init__(self, pair: _Pair, staging: _Staging) -> None:
        super().__init__(pair)
        self._staging = staging
        self._free = deque(staging.slots)
        self._in_flight: deque[tuple[Slot, list[Work]]] = deque()
        self._sequence = 0

    def acquire(self, timeout_s: float) -> Slot:
        if not self._free:
            self._wait_oldest(timeout_s)
        return self._free.popleft()

    def send(self, slot: Slot, num_bytes: int) -> None:
        if not HEADER_BYTES <= num_bytes <= slot.memory.numel():
            raise ValueError(f"a message of {num_bytes} bytes does not fit into a slot")
        group = self._live_group()
        self._staging.upload(slot, num_bytes)
        memory = self._staging.seen_by_group(slot)
        parts = [memory[:num_bytes]]
        if self._staging.is_header_first:
            parts = [part for part in (memory[:HEADER_BYTES], memory[HEADER_BYTES:num_bytes]) if part.numel()]
        works: list[Work] = []
        try:
            for part in parts:
                works.append(group.send([part], _RECEIVER, self._sequence % _TAGS))
                self._sequence += 1
        except RuntimeError as error:
            raise LinkError(_one_line(error)) from error
        self._in_flight.append((slot, works))

    def flush(self, timeout_s: float) -> None:
        while self._in_flight:
            self._wait_oldest(timeout_s)

    def close(self) -> None:
        self._in_flight.clear()
        super().close()

    def _wait_oldest(self, timeout_s: float) -> None:
        slot, works = self._in_flight.popleft()
        _wait(works, timedelta(seconds=timeout_s))
        self._free.append(slot)


class _GroupReceiveEnd(_End):
    def __init__(self, pair: _Pair, plan: LinkPlan, staging: _Staging) -> None:
        super().__init__(pair)
        self._staging = staging
        self._body_timeout = timedelta(seconds=plan.open_timeout_s)
        self._posted: deque[tuple[Slot, Work]] = deque()
        self._free = deque(staging.slots)
        self._sequence = 0
        self._post_free()

    def receive(self) -> Slot:
        self._live_group()
        slot, work = self._posted.popleft()
        _wait([work], _NO_LIMIT)
        if self._staging.is_header_first:
            self._receive_body(slot)
        else:
            self._staging.download(slot, 0, slot.memory.numel())
        return slot

    def release(self, slot: Slot) -> None:
        self._free.append(slot)
        self._post_free()

    def close(self) -> None:
        self._posted.clear()
        super().close()

    def _post_free(self) -> None:
        # Header first: the size of the second message is known only when the first was read, so one at a time.
        while self._free and not (self._staging.is_header_first and self._posted):
            slot = self._free.popleft()
            memory = self._staging.seen_by_group(slot)
            self._posted.append((slot, self._post(memory[:HEADER_BYTES] if self._staging.is_header_first else memory)))

    def _receive_body(self, slot: Slot) -> None:
        self._staging.download(slot, 0, HEADER_BYTES)
        try:
            header = decode_header(slot.view()[:HEADER_BYTES], slot.memory.numel() - HEADER_BYTES)
        except FrameRefused as error:
            raise LinkError(f"what follows a header that cannot be read is lost: {error}") from error
        end = HEADER_BYTES + header.payload_bytes
        if header.payload_bytes:
            work = self._post(self._staging.seen_by_group(slot)[HEADER_BYTES:end])
            _wait([work], self._body_timeout)
            self._staging.download(slot, HEADER_BYTES, end)

    def _post(self, memory: Tensor) -> Work:
        try:
            work = self._live_group().recv([memory], _SENDER, self._sequence % _TAGS)
        except RuntimeError as error:
            raise LinkError(_one_line(error)) from error
        self._sequence += 1
        return work


def _wait(works: list[Work], timeout: timedelta) -> None:
    try:
        for work in works:
            work.wait(timeout)
    except RuntimeError as error:
        raise LinkError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """Return the first line of a C++ message, which may go on with a stack."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
