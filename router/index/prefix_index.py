"""Which worker holds which prefix, and which is about to: over all workers, under one byte cap for the whole process.

What is kept of a block: who has it on the device, who on the host, and to whom a prompt with it is on its way
(predicted, so that the siblings of a burst follow the first of them; lapses unless the worker's own event confirms it).
For every worker the blocks it holds are closed towards the root: storing a block says that all above it are there,
and removing one takes what is below it, since that could not be used. So holders only get fewer along a prompt, and
a prompt is matched against all workers by bisection: a few look-ups for each different depth, none per worker.

1. The mirror of the KV events calls `store`, `remove`, `replace`, `forget` and `sweep`; the dispatcher `observe` for
   every prompt that arrives, `match` for every decision, `predict` for every prompt it sends, and `withdraw` for every
   one that the worker did not take.
2. A worker that is forgotten (it restarted, cleared its cache, or left) is out of every match at once. `sweep` takes
   its bits out of the entries a bounded piece at a time; until then they stay with a bit of the index that is no
   worker's, so the worker may come back before.
3. At the cap the least recently used block goes that has none below it (`router.index.table`). All arrays have
   their size from the start, so the cap holds at every moment and not only between growths.

Knows nothing of epochs and sequence numbers; `router.index.kv_feed` does.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np

from core.blocks import HASH_BYTES
from core.ids import WorkerId
from core.kv_events import BlocksStored, Tier
from router.index.bits import IndexBits
from router.index.forest import Forest
from router.index.holders import (
    held_somewhere,
    joined,
    lapsed,
    moved,
    promised,
    removed_from_device,
    removed_from_host,
    stored_on_device,
    stored_on_host,
    without,
)
from router.index.hot import HotPrefixes
from router.index.layout import BLOCK_BYTES, NONE
from router.index.match import PrefixMatch, Run
from router.index.slots import WorkerSlots
from router.index.wheel import PredictionWheel

TICK_S = 1.0
"""A prediction lapses at the first tick after its time."""
MIN_BYTES = 2**16
"""The least cap: so much is set aside for what is not blocks, and 4 sixteenths of the rest."""
_LEAST_LAPSES = 4096  # blocks per prompt that arrives: some 0.1 ms
_SIXTEENTHS_OF_BLOCKS = 12  # the others are for sets of holders (2), the wheel (1) and hot prefixes (1)


class PrefixIndex:
    """The index.

    Args:
        max_bytes: of memory, for everything here together; at least `MIN_BYTES`.
        slots: of the workers; shared with whoever keeps facts about them by slot.

    Concurrency: one thread.
    """

    def __init__(self, max_bytes: int, slots: WorkerSlots) -> None:
        share = (max_bytes - MIN_BYTES) // 16
        self._max_bytes = max_bytes
        self._max_wheel_bytes = share + MIN_BYTES // 4
        self._bits = IndexBits(slots)
        self._forest = Forest(
            max(1, share * _SIXTEENTHS_OF_BLOCKS // BLOCK_BYTES), max_set_bytes=2 * share + MIN_BYTES // 2
        )
        self._wheel = PredictionWheel(TICK_S)
        self._hot = HotPrefixes(share + MIN_BYTES // 4)
        self._swept = 0  # nodes of the sweep under way

    @staticmethod
    def bytes_for(num_blocks: int) -> int:
        """Return the cap under which so many blocks are kept."""
        return MIN_BYTES + 16 * -(-num_blocks * BLOCK_BYTES // _SIXTEENTHS_OF_BLOCKS)

    def __len__(self) -> int:
        """How many blocks are known."""
        return len(self._forest)

    @property
    def max_blocks(self) -> int:
        return self._forest.max_blocks

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return self._forest.num_bytes + self._wheel.num_bytes + self._hot.num_bytes

    def store(
        self, worker_id: WorkerId, hashes: Sequence[bytes], tier: Tier = Tier.DEVICE, *, parent: bytes = b""
    ) -> None:
        """Note that `worker_id` holds these blocks of one chain, in order of depth, and all above them.

        Args:
            parent: hash before the first, the root of the namespace (or nothing) for the first block of a prompt.

        Raises:
            ProtocolError: a hash is not one; nothing changes.
        """
        if not hashes:
            return
        (above,) = self._forest.find([parent]) if len(parent) == HASH_BYTES else (NONE,)
        deepest = self._thread(hashes, above)
        if deepest == NONE:
            return
        bit = 1 << self._bits.of(worker_id)
        if tier is Tier.DEVICE:
            self._forest.climb(deepest, stored_on_device(bit))
        else:
            stored, above = self._forest.ancestry(deepest, min(len(hashes), self._forest.depth(deepest) + 1))
            self._forest.rewrite(stored, stored_on_host(bit))
            self._forest.climb(above, held_somewhere(bit))
        self._forest.settle()

    def remove(self, worker_id: WorkerId, hashes: Iterable[bytes], tier: Tier = Tier.DEVICE) -> None:
        """Note that `worker_id` evicted these blocks. Unknown ones are fine: the cap may have dropped them.

        Raises:
            ProtocolError: a hash is not one; nothing changes.
        """
        index_bit = self._bits.find(worker_id)
        if index_bit is None:
            return
        bit = 1 << index_bit
        edit = removed_from_device(bit) if tier is Tier.DEVICE else removed_from_host(bit)
        known = [node for node in self._forest.find(list(hashes)) if node != NONE]
        self._forest.cut(known, edit, bit, is_deep=tier is Tier.DEVICE)
        self._forest.settle()

    def predict(self, worker_id: WorkerId, hashes: Sequence[bytes], now: float, ttl_s: float) -> int:
        """Note that a prompt with these blocks is on its way to `worker_id`, which will hold them on the device.

        A block lapses `ttl_s` from now, rounded up to a tick, unless an event confirms it or another prompt with it
        goes there. Says nothing more when the share of the cap for predictions is used up.

        Returns:
            How many leading blocks the worker had already, or was promised: the others can be withdrawn.
        """
        if not hashes or self._wheel.num_bytes > self._max_wheel_bytes:
            return len(hashes)
        deepest = self._thread(hashes, NONE)
        if deepest == NONE:
            return len(hashes)
        bit, tick = 1 << self._bits.of(worker_id), self._wheel.tick(now + ttl_s)
        num_known = max((depth for depth, ready, _ in self._forest.match(hashes) if ready & bit), default=0)
        changed = self._forest.climb(deepest, promised(bit, tick))
        if len(changed):
            self._wheel.add(tick, changed)
        self._forest.settle()
        return num_known

    def withdraw(self, worker_id: WorkerId, hashes: Sequence[bytes], kept: int) -> None:
        """The prompt does not go there: take back what was predicted of its blocks after the first `kept`.

        What an event has confirmed stays.
        """
        index_bit = self._bits.find(worker_id)
        if index_bit is None:
            return
        known = [node for node in self._forest.find(hashes)[kept:] if node != NONE]
        first = kept + bisect_left(known, True, key=lambda node: not self._forest.holders(node).device >> index_bit & 1)
        self.remove(worker_id, hashes[first : first + 1])

    def expire(self, now: float, max_blocks: int = sys.maxsize) -> None:
        """Let the predictions lapse whose time is over, at least `max_blocks` blocks of them if there are so many.

        `observe` does this in pieces; call it only to have all of it done.
        """
        due = self._wheel.due(now, max_blocks)
        if due:
            for tick, predictions in groupby(due, key=itemgetter(0)):
                self._forest.rewrite(np.concatenate([nodes for _, nodes in predictions]), lapsed(tick))
            self._forest.settle()

    def observe(self, hashes: Sequence[bytes], now: float) -> None:
        """Note that a prompt with these blocks has arrived, once for every request: what is hot follows from it.

        Lets predictions lapse, more of them than the prompt can add.
        """
        self._hot.observe(hashes, now)
        self.expire(now, max(_LEAST_LAPSES, 2 * len(hashes)))

    def forget(self, worker_id: WorkerId) -> None:
        """Drop all that `worker_id` holds: it cleared its cache, restarted or left. Constant time; see `sweep`."""
        self._bits.retire(worker_id)

    def replace(self, worker_id: WorkerId, chains: Iterable[BlocksStored]) -> None:
        """Note that `worker_id` holds these chains and no others; what is on its way there still is.

        Only what was promised below a block that turns out to be neither there nor promised goes with that block.

        Raises:
            ProtocolError: a hash is not one; the chains before that one are stored.
        """
        before = self._bits.find(worker_id)
        self._bits.retire(worker_id)
        bit = 1 << self._bits.of(worker_id)
        if before is not None:
            self._forest.rewrite(self._wheel.nodes(), moved(1 << before, bit))
            self._forest.settle()
        try:
            for chain in chains:
                self.store(worker_id, chain.hashes, chain.tier, parent=chain.parent)
        finally:
            self._forest.cut(
                self._forest.stranded(self._wheel.nodes(), bit), removed_from_device(bit), bit, is_deep=True
            )
            self._forest.settle()

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """Return how many leading blocks of `hashes` each worker holds. Touches them."""
        hot_blocks, hot_reuses = self._hot.measure(hashes)
        runs: list[Run] = []
        live = self._bits.live
        for depth, ready, anywhere in self._forest.match(hashes) if hashes else ():
            run = Run(depth, ready & live, anywhere & live)
            if not run.anywhere:
                break
            if runs and runs[-1].anywhere == run.anywhere and runs[-1].device == run.device:
                runs.pop()  # they differed in workers that are gone, or in when a prediction lapses
            runs.append(run)
        return PrefixMatch(runs, self._bits.slot_of_bit, self._bits.slots, hot_blocks, hot_reuses)

    def sweep(self, max_entries: int) -> bool:
        """Clean up to `max_entries` of forgotten workers. Returns whether work is left; call it now and then."""
        dead = self._bits.begin_sweep()
        if not dead:
            return False
        stop = min(self._swept + max_entries, self._forest.num_used)
        self._forest.rewrite(np.arange(self._swept, stop, dtype=np.int32), without(dead))
        self._forest.settle()
        self._swept = stop
        if stop == self._forest.num_used:
            self._swept = 0
            self._bits.end_sweep()
        return self._bits.has_retired

    def check(self) -> None:
        """Assert that every part is consistent in itself and with the others. Linear in the blocks."""
        self._bits.check()
        self._forest.check(live=self._bits.live, known=self._bits.known)
        assert self.num_bytes <= self._max_bytes

    def _thread(self, hashes: Sequence[bytes], above: int) -> int:
        """Put a chain into the forest. Returns its deepest node, or NONE."""
        while True:
            deepest, adopted = self._forest.thread(hashes, above)
            if adopted == NONE:
                return deepest
            below = self._forest.holders(adopted)
            changed = self._forest.climb(self._forest.parent(adopted), joined(below, self._bits.named))
            for tick, _ in below.coming:
                self._wheel.add(tick, changed)
