"""The requests that live on one worker, found by id, by transfer and by the gateway stream that brought them.

A worker holds at most a few hundred, so the earliest deadline is looked for, not kept in order.
"""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from core.ids import RequestId, TransferId


class RequestMachine(Protocol):
    """What the table needs of a request's state machine."""

    @property
    def request_id(self) -> RequestId: ...

    @property
    def transfer_id(self) -> TransferId | None: ...

    def next_deadline(self) -> float | None: ...

    def check(self) -> None: ...


M = TypeVar("M", bound=RequestMachine)
S = TypeVar("S")


class RequestTable(Generic[M, S]):
    """Machines of type M, each brought by a stream of type S."""

    def __init__(self) -> None:
        self._machines: dict[RequestId, M] = {}
        self._streams: dict[RequestId, S] = {}
        self._transfers: dict[TransferId, RequestId] = {}

    def __len__(self) -> int:
        return len(self._machines)

    def __iter__(self) -> Iterator[M]:
        """Over a copy: the table may change meanwhile."""
        return iter(list(self._machines.values()))

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._machines

    def add(self, machine: M, stream: S) -> None:
        """Add a machine whose request id and transfer id are both new here."""
        assert machine.request_id not in self._machines
        self._machines[machine.request_id] = machine
        self._streams[machine.request_id] = stream
        if machine.transfer_id is not None:
            assert machine.transfer_id not in self._transfers
            self._transfers[machine.transfer_id] = machine.request_id

    def remove(self, machine: M) -> None:
        del self._machines[machine.request_id]
        del self._streams[machine.request_id]
        if machine.transfer_id is not None:
            del self._transfers[machine.transfer_id]

    def get(self, request_id: RequestId) -> M | None:
        return self._machines.get(request_id)

    def of_transfer(self, transfer_id: TransferId) -> M | None:
        request_id = self._transfers.get(transfer_id)
        return None if request_id is None else self._machines[request_id]

    def stream_of(self, machine: M) -> S:
        return self._streams[machine.request_id]

    def of_stream(self, stream: S) -> list[M]:
        return [machine for request_id, machine in self._machines.items() if self._streams[request_id] is stream]

    def next_deadline(self) -> float | None:
        deadlines = [deadline for machine in self if (deadline := machine.next_deadline()) is not None]
        return min(deadlines, default=None)

    def due(self, now: float) -> list[M]:
        """Return the machines whose deadline has come."""
        return [machine for machine in self if (deadline := machine.next_deadline()) is not None and deadline <= now]

    def check(self) -> None:
        """Assert that the three indexes agree and every machine is sound."""
        assert self._machines.keys() == self._streams.keys()
        with_transfer = {m.transfer_id: m.request_id for m in self if m.transfer_id is not None}
        assert with_transfer == self._transfers
        for machine in self:
            machine.check()
