"""The store port in one process: for tests and simulation. Same contract suite as the real one.

Leases run on the given clock, so a test turns it by hand; waiting in `read` is real waiting, on a condition.
`set_available(False)` is the outage: every call raises until it is undone, and nothing is lost meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence

from core.clock import Clock, MonotonicClock
from core.errors import StoreUnavailable
from core.store import LeasedAppend, StreamEntry, Taken
from core.token_bucket import BucketTake, TokenBucket


class MemoryStore:
    """Implements `core.store.Store`."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._values: dict[str, tuple[bytes, float | None]] = {}  # value, when its lease ends
        self._streams: dict[str, deque[tuple[int, bytes]]] = {}
        self._stream_ends: dict[str, float] = {}  # when the lease of a stream that has one ends
        self._buckets: dict[str, TokenBucket] = {}
        self._slots: dict[str, dict[str, float]] = {}  # when each holder's lease ends
        self._last_entry = 0
        self._grown = asyncio.Condition()
        self._available = True

    def set_available(self, available: bool) -> None:
        """Begin or end an outage."""
        self._available = available

    async def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        self._check()
        self._values[key] = (value, None if ttl_s is None else self._clock.now() + ttl_s)

    async def get(self, key: str) -> bytes | None:
        self._check()
        value, lease_end = self._values.get(key, (None, None))
        if lease_end is not None and self._clock.now() >= lease_end:
            del self._values[key]
            return None
        return value

    async def delete(self, key: str) -> None:
        self._check()
        self._values.pop(key, None)
        self._streams.pop(key, None)
        self._stream_ends.pop(key, None)
        self._buckets.pop(key, None)
        self._slots.pop(key, None)

    async def scan(self, prefix: str) -> Mapping[str, bytes]:
        self._check()
        found = {key: await self.get(key) for key in list(self._values) if key.startswith(prefix)}
        return {key: value for key, value in found.items() if value is not None}

    async def increment(self, key: str) -> int:
        count = int(await self.get(key) or 0) + 1
        _, lease_end = self._values.get(key, (b"", None))
        self._values[key] = (str(count).encode(), lease_end)
        return count

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes, *, ttl_s: float | None = None
    ) -> bool:
        if await self.get(key) != expected:
            return False
        await self.put(key, value, ttl_s=ttl_s)
        return True

    async def append(self, stream: str, value: bytes, *, max_entries: int) -> str:
        self._check()
        entry_id = self._append(stream, value, max_entries)
        async with self._grown:
            self._grown.notify_all()
        return entry_id

    async def append_leased(self, appends: Sequence[LeasedAppend]) -> Sequence[bool]:
        self._check()
        self._end_leases()
        done = []
        for one in appends:
            if one.is_first:
                self._streams.pop(one.stream, None)
            done.append(one.is_first or one.stream in self._streams)
            if done[-1]:
                self._append(one.stream, one.value, one.max_entries)
                self._stream_ends[one.stream] = self._clock.now() + one.ttl_s
        async with self._grown:
            self._grown.notify_all()
        return done

    async def read(
        self, streams: Mapping[str, str], *, max_entries: int, wait_s: float
    ) -> Mapping[str, list[StreamEntry]]:
        self._check()
        found = self._after(streams, max_entries)
        if found or wait_s <= 0 or not streams:
            return found
        try:
            async with asyncio.timeout(wait_s), self._grown:
                await self._grown.wait_for(lambda: bool(self._after(streams, max_entries)))
        except TimeoutError:
            pass  # nothing came: an empty answer
        self._check()
        return self._after(streams, max_entries)

    async def take_tokens(self, takes: Sequence[BucketTake], *, is_forced: bool = False) -> Taken:
        self._check()
        now = self._clock.now()
        buckets = [self._buckets.setdefault(take.key, TokenBucket(take.capacity, now)) for take in takes]
        waits = []
        for bucket, take in zip(buckets, takes, strict=True):
            bucket.refill(take, now)
            waits.append(bucket.wait_s(take))
        longest = max(waits, default=0.0)
        if longest > 0 and not is_forced:
            return Taken(waits.index(longest), longest)
        for bucket, take in zip(buckets, takes, strict=True):
            bucket.take(take)
        return Taken(None, 0.0)

    async def acquire_slot(self, key: str, holder: str, *, limit: int, ttl_s: float) -> bool:
        self._check()
        now = self._clock.now()
        held = {name: ends for name, ends in self._slots.get(key, {}).items() if ends > now}
        self._slots[key] = held
        if holder not in held and len(held) >= limit:
            return False
        held[holder] = now + ttl_s
        return True

    async def renew_slots(self, key: str, holders: Sequence[str], *, ttl_s: float) -> None:
        self._check()
        ends = self._clock.now() + ttl_s
        self._slots.setdefault(key, {}).update(dict.fromkeys(holders, ends))

    async def release_slot(self, key: str, holder: str) -> None:
        self._check()
        self._slots.get(key, {}).pop(holder, None)

    async def ping(self) -> None:
        self._check()

    async def close(self) -> None:
        """Nothing is held."""

    def _check(self) -> None:
        if not self._available:
            raise StoreUnavailable("the store is down (memory store, outage on purpose)")

    def _append(self, stream: str, value: bytes, max_entries: int) -> str:
        self._last_entry += 1
        entries = self._streams.setdefault(stream, deque())
        entries.append((self._last_entry, value))
        while len(entries) > max_entries:
            entries.popleft()
        return str(self._last_entry)

    def _end_leases(self) -> None:
        now = self._clock.now()
        for stream in [stream for stream, ends_at in self._stream_ends.items() if now >= ends_at]:
            del self._stream_ends[stream]
            self._streams.pop(stream, None)

    def _after(self, streams: Mapping[str, str], max_entries: int) -> dict[str, list[StreamEntry]]:
        self._end_leases()
        found = {}
        for stream, after in streams.items():
            news = [StreamEntry(str(n), value) for n, value in self._streams.get(stream, ()) if n > int(after)]
            if news:
                found[stream] = news[:max_entries]
        return found
