"""Which leading blocks a good part of all recent prompts share, and how often they come: a sketch of bounded size.

A system prompt that everybody sends is no reason to send everybody to the worker that has it: whoever computes it
once has it for all that follow. The cost therefore divides what a missing hot block costs by the number of prompts
that will make use of it. This says which blocks those are.

Space-Saving (Metwally et al., 2005) over block hashes: a block that is not counted takes the place and the count of
the least one, and remembers that count as its error; what is reported is the count less the error, never too much.
Older prompts weigh less, by half per `HALF_LIFE_S`: weights of new ones grow, nothing else has to be touched.

Not every block of a prompt is counted. Counts only get smaller along a prompt, so depths on a grid do (every one of
the first 16, then 8 per doubling: a hot prefix is found 1/8 too short at worst), and only twice as deep as the prompt
is shared by a quarter of what makes it hot. So a prompt costs a few look-ups, whatever its length.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

HALF_LIFE_S = 60.0
HOT_RATIO = 0.1
"""Of recent prompts that share a block, for it to be hot."""
MIN_PROMPTS = 8.0
"""Recent prompts with it, likewise."""
_WARM_PROMPTS = 2.0
_WARM_RATIO = HOT_RATIO / 4
_FIRST_LEVELS = 4
_ENTRY_BYTES = 400  # key, counter, heap entry, and their places; measured
_MAX_ENTRIES = 8192
_MAX_WEIGHT = 2.0**64


def _grid() -> tuple[int, ...]:
    depths = list(range(16))
    while depths[-1] < 2**22:
        octave = depths[-1] + 1
        depths += [octave + (part + 1) * octave // 8 - 1 for part in range(8)]
    return tuple(depths)


GRID = _grid()
"""Positions of a prompt's blocks that are counted."""


@dataclass(slots=True)
class _Counter:
    count: float
    error: float


class HotPrefixes:
    """The sketch. Concurrency: one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_entries = min(_MAX_ENTRIES, max(1, max_bytes // _ENTRY_BYTES))
        self._counters: dict[bytes, _Counter] = {}
        self._least: list[tuple[float, bytes]] = []  # heap; a count may have grown since it was put here
        self._total = 0.0
        self._weight = 1.0  # of a prompt that arrives now
        self._now = 0.0

    @property
    def num_bytes(self) -> int:
        return len(self._counters) * _ENTRY_BYTES

    def observe(self, hashes: Sequence[bytes], now: float) -> None:
        """Count a prompt that arrives. A clock that steps back is taken to stand."""
        self._age(now)
        self._total += self._weight
        allowed = _FIRST_LEVELS
        warm = max(_WARM_PROMPTS * self._weight, _WARM_RATIO * self._total)
        for level, position in enumerate(GRID):
            if position >= len(hashes) or level >= allowed:
                return
            counter = self._count(hashes[position])
            if counter.count - counter.error >= warm:
                allowed = 2 * level + _FIRST_LEVELS

    def measure(self, hashes: Sequence[bytes]) -> tuple[int, float]:
        """Return how many leading blocks are hot, and how many recent prompts share them all (weighted by age)."""
        least = max(HOT_RATIO * self._total, MIN_PROMPTS * self._weight)
        low, high = 0, bisect_left(GRID, len(hashes))
        while low < high:
            middle = (low + high) // 2
            if self._shared(hashes[GRID[middle]]) >= least:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return 0, 0.0
        position = GRID[low - 1]
        return position + 1, self._shared(hashes[position]) / self._weight

    def _shared(self, block: bytes) -> float:
        counter = self._counters.get(block)
        return 0.0 if counter is None else counter.count - counter.error

    def _count(self, block: bytes) -> _Counter:
        counter = self._counters.get(block)
        if counter is not None:
            counter.count += self._weight
            return counter
        if len(self._counters) < self._max_entries:
            counter = _Counter(self._weight, 0.0)
            heapq.heappush(self._least, (counter.count, block))
        else:
            error = self._pop_least()
            counter = _Counter(error + self._weight, error)
            heapq.heapreplace(self._least, (counter.count, block))
        self._counters[block] = counter
        return counter

    def _pop_least(self) -> float:
        """Drop the least counter, leaving its place at the top of the heap. Returns its count."""
        while True:
            noted, block = self._least[0]
            count = self._counters[block].count
            if count <= noted:
                del self._counters[block]
                return count
            heapq.heapreplace(self._least, (count, block))

    def _age(self, now: float) -> None:
        if now > self._now:
            self._weight *= 2.0 ** min((now - self._now) / HALF_LIFE_S, 512.0)
            self._now = now
        if self._weight > _MAX_WEIGHT:
            for counter in self._counters.values():
                counter.count /= self._weight
                counter.error /= self._weight
            self._least = [(counter.count, block) for block, counter in self._counters.items()]
            heapq.heapify(self._least)
            self._total /= self._weight
            self._weight = 1.0
