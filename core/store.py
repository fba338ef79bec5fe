"""The port to the shared store. `core.store_redis` is the real one, `core.store_memory` does the same in one process.

Everybody keeps a local mirror and works on when the store is gone: every method raises `StoreUnavailable` within its
deadline rather than waiting for the store to come back.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class StreamEntry(NamedTuple):
    """One entry of a stream; ids grow, compare by order of arrival, and mean nothing else."""

    entry_id: str
    value: bytes


STREAM_START = "0"
"""Read from the oldest entry kept."""


class Store(Protocol):
    """Keys, counters and streams. Every call has a deadline of its own (seconds, given at construction).

    Raises (all methods):
        StoreUnavailable: no answer within the deadline, or the connection is refused. Whether a write happened is then
            unknown; every writer here may repeat its write safely.
    Concurrency: one event loop; calls may overlap.
    """

    async def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        """Set `key`; with `ttl_s` it vanishes unless put again in time (a lease)."""
        ...

    async def get(self, key: str) -> bytes | None: ...

    async def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        ...

    async def scan(self, prefix: str) -> Mapping[str, bytes]:
        """Return all live keys that begin with `prefix`, with their values. Not a snapshot: keys may come and go."""
        ...

    async def increment(self, key: str) -> int:
        """Add one to a counter (0 when absent) and return the new value."""
        ...

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes, *, ttl_s: float | None = None
    ) -> bool:
        """Set `key` only if it holds `expected` (None: is absent). Atomic."""
        ...

    async def append(self, stream: str, value: bytes, *, max_entries: int) -> str:
        """Append to `stream`, trimming the oldest beyond about `max_entries`. Returns the entry's id."""
        ...

    async def read(
        self, streams: Mapping[str, str], *, max_entries: int, wait_s: float
    ) -> Mapping[str, list[StreamEntry]]:
        """Return entries after the given id of each stream, oldest first; waits up to `wait_s` while there are none."""
        ...

    async def ping(self) -> None:
        """Return if the store answers."""
        ...

    async def close(self) -> None: ...
