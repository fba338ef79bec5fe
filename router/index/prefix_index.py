"""Which worker holds which prefix, and which is about to: over all workers, under one byte cap for the whole process.

What is kept of a block: who has it on the device, who on the host, and to whom a prompt with it is on its way
(predicted, so that the siblings of a burst follow the first of them; lapses unless the worker's own event confirms it).
For every worker the blocks it holds are closed towards the root: storing a block says that all above it are there,
and removing one takes what is below it, since that could not be used. So holders only get fewer along a prompt, and
a prompt is matched against all workers by bisection: a few look-ups for each different depth, none per worker.

1. The mirror of the KV events calls `store`, `remove`, `forget` and `sweep`; the dispatcher `observe` for every prompt
   that arrives, `match` for every decision and `predict` for every prompt it sends.
2. A worker that is forgotten (it restarted, cleared its cache, or left) is out of every match at once. `sweep` takes
   its bits out of the entries a bounded piece at a time; until then they stay with a bit of the index that is no
   worker's, so the worker may come back before.
3. At the cap the least recently used block goes that has none below it (`router.index.table`). All arrays have
   their size from the start, so the cap holds at every moment and not only between growths.

Knows nothing of epochs and sequence numbers; `router.index.kv_feed` does.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from core.blocks import HASH_BYTES
from core.errors import ProtocolError
from core.ids import WorkerId
from core.kv_events import Tier
from router.index import rewrites, table
from router.index.bits import IndexBits
from router.index.holders import (
    HolderSets,
    SetEdit,
    held_somewhere,
    joined,
    lapsed,
    promised,
    removed_from_device,
    removed_from_host,
    stored_on_device,
    stored_on_host,
    without,
)
from router.index.hot import HotPrefixes
from router.index.match import PrefixMatch, Run
from router.index.prepare import prepare
from router.index.slots import WorkerSlots
from router.index.table import ADOPTED, BLOCK_BYTES, COUNT, NONE, USED
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
        prepare()
        share = (max_bytes - MIN_BYTES) // 16
        self._max_bytes = max_bytes
        self._max_set_bytes = 2 * share + MIN_BYTES // 2
        self._max_wheel_bytes = share + MIN_BYTES // 4
        self._bits = IndexBits(slots)
        self._sets = HolderSets()
        self._wheel = PredictionWheel(TICK_S)
        self._hot = HotPrefixes(share + MIN_BYTES // 4)
        self._table = table.new_table(max(1, share * _SIXTEENTHS_OF_BLOCKS // BLOCK_BYTES))
        self._scratch = np.empty(64, dtype=np.int32)  # nodes that a rewriting changed; runs of a match
        self._packed: tuple[Sequence[bytes], NDArray[np.uint64]] | None = None  # of the prompt before
        self._swept = 0  # nodes of the sweep under way

    @staticmethod
    def bytes_for(num_blocks: int) -> int:
        """Return the cap under which so many blocks are kept."""
        return MIN_BYTES + 16 * -(-num_blocks * BLOCK_BYTES // _SIXTEENTHS_OF_BLOCKS)

    def __len__(self) -> int:
        """How many blocks are known."""
        return int(self._table.head[COUNT])

    @property
    def max_blocks(self) -> int:
        return len(self._table.nodes)

    @property
    def num_bytes(self) -> int:
        """Memory in use. Memory of blocks once used stays, for other blocks."""
        blocks = int(self._table.head[USED]) * self._table.nodes.itemsize + self._table.buckets.nbytes
        return blocks + self._sets.num_bytes + self._wheel.num_bytes + self._hot.num_bytes

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
        keys = self._pack(hashes)
        bit = 1 << self._bits.of(worker_id)
        above = int(self._find([parent])[0]) if len(parent) == HASH_BYTES else NONE
        deepest = self._thread(keys, above)
        if deepest == NONE:
            return
        if tier is Tier.DEVICE:
            self._climb(deepest, stored_on_device(bit))
        else:
            depth = int(self._table.nodes[deepest]["depth"]) + 1
            stored = np.empty(min(len(hashes), depth), dtype=np.int32)
            above = rewrites.ancestry(self._table.nodes, deepest, stored)
            self._rewrite(stored, stored_on_host(bit))
            self._climb(above, held_somewhere(bit))
        self._settle()

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
        op = self._sets.new_op()
        for node in self._find(list(hashes)).tolist():
            if node != NONE and self._table.nodes[node]["holders"] != table.FREED:  # with one before it
                self._cut(node, op, edit, bit, is_deep=tier is Tier.DEVICE)
        self._settle()

    def predict(self, worker_id: WorkerId, hashes: Sequence[bytes], now: float, ttl_s: float) -> None:
        """Note that a prompt with these blocks is on its way to `worker_id`, which will hold them on the device.

        A block lapses `ttl_s` from now, rounded up to a tick, unless an event confirms it or another prompt with it
        goes there. Says nothing more when the share of the cap for predictions is used up.
        """
        if not hashes or self._wheel.num_bytes > self._max_wheel_bytes:
            return
        deepest = self._thread(self._pack(hashes), NONE)
        if deepest != NONE:
            tick = self._wheel.tick(now + ttl_s)
            changed = self._climb(deepest, promised(1 << self._bits.of(worker_id), tick))
            if len(changed):
                self._wheel.add(tick, changed.copy())
            self._settle()

    def expire(self, now: float, max_blocks: int = sys.maxsize) -> None:
        """Let the predictions lapse whose time is over, at least `max_blocks` blocks of them if there are so many.

        `observe` does this in pieces; call it only to have all of it done.
        """
        due = self._wheel.due(now, max_blocks)
        if due:
            for tick, predictions in groupby(due, key=itemgetter(0)):
                self._rewrite(np.concatenate([nodes for _, nodes in predictions]), lapsed(tick))
            self._settle()

    def observe(self, hashes: Sequence[bytes], now: float) -> None:
        """Note that a prompt with these blocks has arrived, once for every request: what is hot follows from it.

        Lets predictions lapse, more of them than the prompt can add.
        """
        self._hot.observe(hashes, now)
        self.expire(now, max(_LEAST_LAPSES, 2 * len(hashes)))

    def forget(self, worker_id: WorkerId) -> None:
        """Drop all that `worker_id` holds: it cleared its cache, restarted or left. Constant time; see `sweep`."""
        self._bits.retire(worker_id)

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """Return how many leading blocks of `hashes` each worker holds. Touches them."""
        hot_blocks, hot_reuses = self._hot.measure(hashes)
        runs: list[Run] = []
        if hashes:
            out = self._room(2 * len(hashes))[: 2 * len(hashes)].reshape(-1, 2)
            count = table.match(*self._table, self._pack(hashes), out)
            live = self._bits.live
            for depth, set_id in out[:count].tolist():
                ready, anywhere = self._sets.reach(set_id)
                ready &= live
                anywhere &= live
                if not anywhere:
                    break
                if runs and runs[-1].anywhere == anywhere and runs[-1].device == ready:
                    runs.pop()
                runs.append(Run(depth, ready, anywhere))
        return PrefixMatch(runs, self._bits.slot_of_bit, self._bits.slots, hot_blocks, hot_reuses)

    def sweep(self, max_entries: int) -> bool:
        """Clean up to `max_entries` of forgotten workers. Returns whether work is left; call it now and then."""
        dead = self._bits.begin_sweep()
        if not dead:
            return False
        stop = min(self._swept + max_entries, int(self._table.head[USED]))
        self._rewrite(np.arange(self._swept, stop, dtype=np.int32), without(dead))
        self._settle()
        self._swept = stop
        if stop == self._table.head[USED]:
            self._swept = 0
            self._bits.end_sweep()
        return self._bits.has_retired

    def check(self) -> None:
        """Assert that every part is consistent in itself and with the others. Linear in the blocks."""
        self._bits.check()
        self._sets.check()
        nodes = self._table.nodes[: self._table.head[USED]]
        used = nodes[nodes["holders"] != table.FREED]
        assert len(used) == len(self)
        is_leaf = used["child"] == NONE
        assert (used["holders"][is_leaf] != table.NOBODY).all()
        assert (used["older"][is_leaf] != table.UNLISTED).all()
        below = used[used["parent"] != NONE]
        above = nodes[below["parent"]]
        assert (below["depth"] == above["depth"] + 1).all()
        for lower, upper in np.unique(np.stack([below["holders"], above["holders"]], axis=1), axis=0).tolist():
            self._sets.check_closed(lower, upper, self._bits.live)
        for set_id in np.unique(used["holders"]).tolist():
            held = self._sets[set_id]
            assert not (held.device | held.host | held.ready) & ~self._bits.known
        counted = np.bincount(used["holders"], minlength=len(self._sets.cells))
        assert (counted == self._sets.cells[:, table.REFS]).all()
        assert self.num_bytes <= self._max_bytes

    def _pack(self, hashes: Sequence[bytes]) -> NDArray[np.uint64]:  # [blocks, 2]
        if self._packed is not None and self._packed[0] is hashes:
            return self._packed[1]  # the same prompt is matched and then predicted
        joined = b"".join(hashes)
        if len(joined) != HASH_BYTES * len(hashes):
            raise ProtocolError("a block hash has another length than 16 bytes")
        keys = np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)
        if isinstance(hashes, tuple):
            self._packed = (hashes, keys)
        return keys

    def _find(self, hashes: list[bytes]) -> NDArray[np.int32]:
        """Return the node of each block, NONE for unknown ones."""
        found = np.empty(len(hashes), dtype=np.int32)
        table.find_all(self._table.nodes, self._table.buckets, self._pack(hashes), found)
        return found

    def _thread(self, keys: NDArray[np.uint64], above: int) -> int:
        """Put a chain into the table. Returns its deepest node, or NONE."""
        while True:
            deepest = int(table.thread(*self._table, self._sets.cells, keys, above))
            adopted = self._table.head[ADOPTED]
            if adopted == NONE:
                return deepest
            root = self._table.nodes[adopted]
            below = self._sets[int(root["holders"])]
            changed = self._climb(int(root["parent"]), joined(below, self._bits.named))
            for tick, _ in below.coming:
                self._wheel.add(tick, changed.copy())

    def _room(self, size: int) -> NDArray[np.int32]:
        if len(self._scratch) < size:
            self._scratch = np.empty(2 * size, dtype=np.int32)
        return self._scratch

    def _climb(self, node: int, edit: SetEdit) -> NDArray[np.int32]:
        """Rewrite from `node` upwards. Returns the nodes that changed, deepest first, until the next call."""
        if node == NONE:
            return self._scratch[:0]
        changed = self._room(int(self._table.nodes[node]["depth"]) + 1)
        op, count = self._sets.new_op(), 0
        while True:
            node, count = rewrites.climb(
                self._table.nodes, self._table.head, self._sets.cells, op, node, changed, count
            )
            if node == NONE:
                return changed[:count]
            self._sets.note(int(self._table.nodes[node]["holders"]), op, edit)

    def _cut(self, top: int, op: int, edit: SetEdit, bit: int, *, is_deep: bool) -> None:
        node = top
        while True:
            node = rewrites.cut(*self._table, self._sets.cells, op, top, node, is_deep)
            if node == NONE:
                return
            held = int(self._table.nodes[node]["holders"])
            if self._table.head[table.BARE] == NONE:
                self._sets.note(held, op, edit, bit=bit)
            else:
                self._sets.note(held, op + 1, without(bit))

    def _rewrite(self, nodes: NDArray[np.int32], edit: SetEdit) -> None:
        op, at = self._sets.new_op(), 0
        while True:
            at = rewrites.rewrite(*self._table, self._sets.cells, op, nodes, at)
            if at == len(nodes):
                return
            self._sets.note(int(self._table.nodes[nodes[at]]["holders"]), op, edit)

    def _settle(self) -> None:
        """After a rewriting: drop unused sets, and blocks as long as the sets in use are too many."""
        self._sets.reclaim(self._table.head)
        while self._sets.num_bytes > self._max_set_bytes and len(self):
            spare = self.max_blocks - len(self)
            table.evict(*self._table, self._sets.cells, spare + 1 + len(self) // 64, NONE)
            self._sets.reclaim(self._table.head)
