"""A decode pool without room, for as long as a test wants: reservations for KV that nobody sends hold every place.

Streams that generate would not do: a context is not endless, and a worker may be done with one while its client reads.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator

from core.ids import RequestId
from core.membership import Role
from core.request import GenerateRequest, SamplingParams
from protos import codec, worker_pb2
from router.fleet import Fleet
from tests.worker_stream import WorkerStream, decode_stream

_LEASE_S = 300.0
_numbers = itertools.count()  # a worker remembers the transfers that have ended


class HeldPlaces:
    """Reservations at decode workers; each goes when it is freed, or its worker dies."""

    def __init__(self) -> None:
        self._held: list[tuple[WorkerStream, RequestId]] = []

    async def take(self, stream: WorkerStream) -> None:
        """Return when the worker has accepted one more."""
        name = RequestId(f"held-{next(_numbers)}")
        request = GenerateRequest(name, (17,), SamplingParams(max_tokens=2))
        await stream.send(
            submit=worker_pb2.DecodeSubmit(
                request=codec.request_to_wire(request), transfer_id=f"{name}/0", lease_s=_LEASE_S
            )
        )
        await stream.answer("accepted", name)
        self._held.append((stream, name))

    async def free_one(self) -> None:
        stream, name = self._held.pop(0)
        await stream.abort(name)

    def check(self) -> None:
        """Assert that none was lost."""
        assert self._held
        for stream, name in self._held:
            assert not stream.is_over, stream.error
            assert stream.kinds(name) == ["accepted"]


@contextlib.asynccontextmanager
async def full_decode_pool(fleet: Fleet, places_each: int) -> AsyncIterator[HeldPlaces]:
    """Hold so many places of every decode worker that `fleet` knows; nobody else may hold any."""
    async with contextlib.AsyncExitStack() as streams:
        places = HeldPlaces()
        for record in fleet.records.values():
            if record.role is Role.DECODE:
                stream = await streams.enter_async_context(decode_stream(record.address, record.epoch))
                for _ in range(places_each):
                    await places.take(stream)
        yield places
