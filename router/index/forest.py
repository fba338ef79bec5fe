"""The blocks that the index knows with the sets of their holders: rewritings by any rule, under one bound.

Between the compiled walks (`router.index.table`, `router.index.rewrites`) and what they mean for workers
(`router.index.prefix_index`). A walk that meets a set of holders for the first time stops there; it is told here what
becomes of the set, and walks on.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.blocks import HASH_BYTES
from core.errors import ProtocolError
from router.index import rewrites, table
from router.index.holders import HolderSet, HolderSets, SetEdit, without
from router.index.layout import ADOPTED, BARE, COUNT, FREED, NOBODY, NONE, REFS, UNLISTED, USED, new_table
from router.index.prepare import prepare


class Forest:
    """Blocks by hash, each below the one before it.

    Args:
        max_blocks: kept, the least recently used leave for others.
        max_set_bytes: of the sets of holders; blocks leave until those of the rest take no more.

    Concurrency: one thread. After `climb`, `cut` and `rewrite`, and before anything else, `settle`.
    """

    def __init__(self, max_blocks: int, max_set_bytes: int) -> None:
        prepare()
        self._max_set_bytes = max_set_bytes
        self._sets = HolderSets()
        self._table = new_table(max_blocks)
        self._holder_ids, self._depths = self._table.nodes["holders"], self._table.nodes["depth"]
        self._scratch = np.empty(64, dtype=np.int32)  # nodes that a rewriting changed; runs of a match
        self._packed: tuple[Sequence[bytes], NDArray[np.uint64]] | None = None  # of the prompt before

    def __len__(self) -> int:
        return int(self._table.head[COUNT])

    @property
    def max_blocks(self) -> int:
        return len(self._table.nodes)

    @property
    def num_used(self) -> int:
        """Nodes are numbered below this."""
        return int(self._table.head[USED])

    @property
    def num_bytes(self) -> int:
        """Memory in use. That of blocks once used stays, for other blocks."""
        return self.num_used * self._table.nodes.itemsize + self._table.buckets.nbytes + self._sets.num_bytes

    def holders(self, node: int) -> HolderSet:
        return self._sets[self._holders_id(node)]

    def depth(self, node: int) -> int:
        return int(self._depths[node])

    def parent(self, node: int) -> int:
        return int(self._table.nodes[node]["parent"])

    def is_freed(self, node: int) -> bool:
        return self._holders_id(node) == FREED

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the node of each block, NONE for unknown ones.

        Raises:
            ProtocolError: a hash is not one.
        """
        found = np.empty(len(hashes), dtype=np.int32)
        table.find_all(self._table.nodes, self._table.buckets, self._pack(hashes), found)
        return found.tolist()

    def match(self, hashes: Sequence[bytes]) -> list[tuple[int, int, int]]:
        """Use a prompt. Returns for each run of its leading blocks with the same holders: how many blocks it ends
        after, and the masks of those that have them ready and that have them at all."""
        runs = self._room(2 * len(hashes))[: 2 * len(hashes)].reshape(-1, 2)
        count = table.match(*self._table, self._pack(hashes), runs)
        return [(depth, *self._sets.reach(set_id)) for depth, set_id in runs[:count].tolist()]

    def thread(self, hashes: Sequence[bytes], above: int) -> tuple[int, int]:
        """Put a chain below `above` and use it, making room for it.

        Returns:
            Its deepest node, or NONE; and a node on it that was a root and was joined to the one above, or NONE. In
            that case the blocks above have to be given its holders, and the chain is threaded again.

        Raises:
            ProtocolError: a hash is not one.
        """
        deepest = int(table.thread(*self._table, self._sets.cells, self._pack(hashes), above))
        return deepest, int(self._table.head[ADOPTED])

    def stranded(self, nodes: NDArray[np.int32], bit: int) -> list[int]:
        """Return those of `nodes` that the worker of `bit` has ready, or will, while it has not the one above."""
        has = self._sets.ready_by_id(bit)
        held, parents = self._holder_ids, self._table.nodes["parent"]
        nodes = nodes[held[nodes] != FREED]
        nodes = nodes[has[held[nodes]]]
        nodes = nodes[parents[nodes] != NONE]
        stranded: list[int] = np.unique(nodes[~has[held[parents[nodes]]]]).tolist()
        return stranded

    def ancestry(self, node: int, count: int) -> tuple[NDArray[np.int32], int]:
        """Return `node` and those above it, `count` in all, and the node above those (or NONE)."""
        nodes = np.empty(count, dtype=np.int32)
        return nodes, int(rewrites.ancestry(self._table.nodes, node, nodes))

    def climb(self, node: int, edit: SetEdit) -> NDArray[np.int32]:
        """Rewrite from `node` upwards, to the first that stays as it is. Returns what changed, deepest first."""
        if node == NONE:
            return np.empty(0, dtype=np.int32)
        changed = self._room(self.depth(node) + 1)
        op, count = self._sets.new_op(), 0
        self._sets.note(NOBODY, op, edit)  # of new blocks
        while node != NONE:
            node, count = rewrites.climb(
                self._table.nodes, self._table.head, self._sets.cells, op, node, changed, count
            )
            if node != NONE:
                self._sets.note(self._holders_id(node), op, edit)
        return changed[:count].copy()

    def cut(self, tops: Sequence[int], edit: SetEdit, bit: int, *, is_deep: bool) -> None:
        """Rewrite each of these nodes, and below it what only makes sense with it; see `rewrites.cut`.

        Args:
            bit: of the worker that the rewriting is about.
        """
        op = self._sets.new_op()
        for top in tops:
            node = NONE if self.is_freed(top) else top  # with one before it
            while node != NONE:
                node = rewrites.cut(*self._table, self._sets.cells, op, top, node, is_deep)
                if node == NONE:
                    break
                if self._table.head[BARE] == NONE:
                    self._sets.note(self._holders_id(node), op, edit, bit=bit)
                else:
                    self._sets.note(self._holders_id(node), op + 1, without(bit))

    def rewrite(self, nodes: NDArray[np.int32], edit: SetEdit) -> None:
        """Rewrite these nodes; those freed meanwhile are left out."""
        op, at = self._sets.new_op(), 0
        while at < len(nodes):
            at = rewrites.rewrite(*self._table, self._sets.cells, op, nodes, at)
            if at < len(nodes):
                self._sets.note(self._holders_id(int(nodes[at])), op, edit)

    def settle(self) -> None:
        """Drop unused sets, and blocks as long as the sets in use are too many."""
        self._sets.reclaim(self._table.head)
        while self._sets.num_bytes > self._max_set_bytes and len(self):
            spare = self.max_blocks - len(self)
            table.evict(*self._table, self._sets.cells, spare + 1 + len(self) // 64, NONE)
            self._sets.reclaim(self._table.head)

    def check(self, *, live: int, known: int) -> None:
        """Assert that the arrays agree with each other and with the sets. Linear in the blocks.

        Args:
            live: mask of the workers whose blocks are closed towards the root.
            known: mask of the bits that there may be.
        """
        self._sets.check()
        nodes = self._table.nodes[: self.num_used]
        used = nodes[nodes["holders"] != FREED]
        assert len(used) == len(self)
        is_leaf = used["child"] == NONE
        assert (used["holders"][is_leaf] != NOBODY).all()
        assert (used["older"][is_leaf] != UNLISTED).all()
        below = used[used["parent"] != NONE]
        above = nodes[below["parent"]]
        assert (below["depth"] == above["depth"] + 1).all()
        for lower, upper in np.unique(np.stack([below["holders"], above["holders"]], axis=1), axis=0).tolist():
            self._sets.check_closed(lower, upper, live)
        for set_id in np.unique(used["holders"]).tolist():
            held = self._sets[set_id]
            assert not (held.device | held.host | held.ready) & ~known
        counted = np.bincount(used["holders"], minlength=len(self._sets.cells))
        assert (counted == self._sets.cells[:, REFS]).all()

    def _holders_id(self, node: int) -> int:
        return int(self._holder_ids[node])

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

    def _room(self, size: int) -> NDArray[np.int32]:
        if len(self._scratch) < size:
            self._scratch = np.empty(2 * size, dtype=np.int32)
        return self._scratch
