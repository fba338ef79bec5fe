"""The port to the shared store. `core.store_redis` is the real one, `core.store_memory` does the same in one process.

Everybody keeps a local mirror and works on when the store is gone: every method raises `StoreUnavailable` within its
deadline rather than waiting for the store to come back.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from core.token_bucket import BucketTake


class StreamEntry(NamedTuple):
    """One entry of a stream; ids grow, compare by order of arrival, and mean nothing else."""

    entry_id: str
    value: bytes


class LeasedAppend(NamedTuple):
    """An entry for a stream that lives on a lease.

    Attributes:
        ttl_s: the stream vanishes so long after this entry, unless it is appended to again.
        max_entries: the oldest beyond about so many are dropped.
        is_first: the stream begins with this entry; what it held before is dropped. Without, it must be there.
    """

    stream: str
    value: bytes
    ttl_s: float
    max_entries: int
    is_first: bool = False


class Taken(NamedTuple):
    """Answer to a take. `refused`: which of the buckets makes the caller wait longest; None: all was taken."""

    refused: int | None
    retry_after_s: float


STREAM_START = "0"
"""Read from the oldest entry kept."""


class Store(Protocol):
    """Keys, counters, streams, token buckets, slots. Every call has a deadline of its own (seconds, from construction).

    Raises (all methods):
        StoreUnavailable: no answer within the deadline, or the connection is refused. Whether a write happened is then
            unknown; every writer here may repeat its write safely (but `take_tokens`, which may then count twice).
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

    async def append_leased(self, appends: Sequence[LeasedAppend]) -> Sequence[bool]:
        """Append to several streams in one step, in this order. Returns for each whether its stream was there; where it
        was not (it vanished, or the store forgot it), nothing was appended."""
        ...

    async def read(
        self, streams: Mapping[str, str], *, max_entries: int, wait_s: float
    ) -> Mapping[str, list[StreamEntry]]:
        """Return entries after the given id of each stream, oldest first; waits up to `wait_s` while there are none."""
        ...

    async def take_tokens(self, takes: Sequence[BucketTake], *, is_forced: bool = False) -> Taken:
        """Take from all these token buckets or from none, by the rules of `core.token_bucket`. Atomic.

        Args:
            is_forced: takes in any case; a bucket may be left in debt.
        """
        ...

    async def acquire_slot(self, key: str, holder: str, *, limit: int, ttl_s: float) -> bool:
        """Take one of `limit` slots for `holder`, unless as many others hold one. Atomic; a holder holds one, however
        often it asks. The slot comes back when it is released, or `ttl_s` after it was acquired or renewed last."""
        ...

    async def renew_slots(self, key: str, holders: Sequence[str], *, ttl_s: float) -> None:
        """Say that these still hold theirs, whatever the limit: a store that forgot them learns of them again."""
        ...

    async def release_slot(self, key: str, holder: str) -> None:
        """Give a slot back, if it is held."""
        ...

    async def ping(self) -> None:
        """Return if the store answers."""
        ...

    async def close(self) -> None: ...
