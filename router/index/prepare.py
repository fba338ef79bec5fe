"""Compiles what the index runs, or loads it, before the first prompt waits for it."""

from functools import cache

import numpy as np

from router.index import rewrites, table
from router.index.holders import HolderSets, stored_on_device, without
from router.index.layout import NOBODY, NONE, new_table


@cache
def prepare() -> None:
    """Run every compiled function once on a table of one block, with the types that `PrefixIndex` uses."""
    made, sets = new_table(2), HolderSets()
    keys = np.frombuffer(bytes(16), dtype=np.uint64).reshape(-1, 2)
    found = np.empty(2, dtype=np.int32)
    node = int(table.thread(*made, sets.cells, keys, NONE))
    table.match(*made, keys, found.reshape(-1, 2))
    table.find_all(made.nodes, made.buckets, keys, found)
    rewrites.ancestry(made.nodes, node, found[:1])
    op = sets.new_op()
    sets.note(NOBODY, op, stored_on_device(1))
    rewrites.climb(made.nodes, made.head, sets.cells, op, node, found, 0)
    held = int(made.nodes[node]["holders"])
    op = sets.new_op()
    sets.note(held, op, lambda old: old)
    rewrites.rewrite(*made, sets.cells, op, found[:1], 0)
    op = sets.new_op()
    sets.note(held, op, without(1), bit=1)
    rewrites.cut(*made, sets.cells, op, node, node, True)
    table.evict(*made, sets.cells, 2, NONE)
