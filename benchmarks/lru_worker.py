"""What a trivial worker of the router benchmarks does: an LRU cache of blocks, one queue, a time per block computed.

The same for every router that is measured, behind HTTP or behind gRPC. Imports nothing but the standard library: it
also runs in the peers' environment.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """`cache_blocks`: how many it keeps. Service of a request: `request_s` and `block_s` per block not found."""

    cache_blocks: int
    request_s: float
    block_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one prompt. `done_at`: when its only token is due."""

    hit_blocks: int
    stored: tuple[Hashable, ...]
    evicted: tuple[Hashable, ...]
    done_at: float


class LruWorker:
    """One worker. First in first out, one at a time, as a prefill worker is."""

    def __init__(self, shape: WorkerShape) -> None:
        self._shape = shape
        self._blocks: OrderedDict[Hashable, None] = OrderedDict()
        self._free_at = 0.0
        self.num_requests = 0
        self.num_blocks = 0
        self.num_hits = 0

    @property
    def num_computed(self) -> int:
        return self.num_blocks - self.num_hits

    def service_s(self, num_blocks: int) -> float:
        """Seconds of work that a prompt is, of whose blocks so many are not cached."""
        return self._shape.request_s + self._shape.block_s * num_blocks

    def serve(self, blocks: Sequence[Hashable], now: float) -> Served:
        """Take a prompt of these chained blocks: the longest prefix that is cached need not be computed."""
        hits = next((depth for depth, block in enumerate(blocks) if block not in self._blocks), len(blocks))
        stored = tuple(block for block in blocks[hits:] if block not in self._blocks)
        for block in reversed(blocks):  # the deepest is the oldest: a chain loses its end first
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        evicted = []
        while len(self._blocks) > self._shape.cache_blocks:
            evicted.append(self._blocks.popitem(last=False)[0])
        self.num_requests += 1
        self.num_blocks += len(blocks)
        self.num_hits += hits
        self._free_at = max(self._free_at, now) + self.service_s(len(blocks) - hits)
        return Served(hits, stored, tuple(evicted), self._free_at)
