"""The layout of the prefix index's arrays. See `router.index.table`."""

import mmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NODE = np.dtype(
    [
        ("key0", np.uint64),
        ("key1", np.uint64),
        ("parent", np.int32),
        ("child", np.int32),  # the first
        ("next", np.int32),  # sibling
        ("prev", np.int32),
        ("holders", np.int32),
        ("depth", np.int32),
        ("newer", np.int32),
        ("older", np.int32),
        ("chain", np.int32),  # next in the hash bucket; next that is free
    ],
    align=True,
)
BLOCK_BYTES = NODE.itemsize + 2 * 4  # of a node and of at most two hash buckets
NONE = -1
UNLISTED = -2  # in `older`
FREED = -1  # in `holders`
NOBODY = 0  # the id of the empty set

# Cells of `head`.
FREE, USED, COUNT, OLDEST, NEWEST, DYING, BARE, ADOPTED = range(8)
# Columns of `sets`: how many nodes have the set; whether it is listed as dying; that list; what it becomes under the
# rewriting whose number is in OP; whether the worker in question holds the block nowhere any more then.
REFS, LISTED, DEAD, TARGET, OP, LOSS = range(6)


class Table(NamedTuple):
    """The arrays, as every compiled function takes them."""

    nodes: NDArray[np.void]
    buckets: NDArray[np.int32]
    head: NDArray[np.int64]


def new_table(num_blocks: int) -> Table:
    """Return an empty table. Pages are not touched before they are used, except those of the buckets."""
    head = np.zeros(8, dtype=np.int64)
    head[[FREE, OLDEST, NEWEST, BARE, ADOPTED]] = NONE
    buckets = np.full(1 << (num_blocks - 1).bit_length(), NONE, dtype=np.int32)
    # Mapped here rather than by NumPy, which asks for huge pages: making one stops a decision for milliseconds.
    nodes = np.frombuffer(mmap.mmap(-1, num_blocks * NODE.itemsize), dtype=NODE)
    return Table(nodes, buckets, head)
