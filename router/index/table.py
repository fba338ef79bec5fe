"""The blocks that the index knows, as a forest in flat arrays, compiled: find, thread a chain, match, evict.

One node per block: its hash, its place among parent and siblings, the id of the set of its holders
(`router.index.holders`), its depth, and its place in the order of use. All arrays have their full size from the
beginning, so nothing is ever copied to grow, and the process has no more memory than the pages that were touched.

- A node's parent is known, or the node is a root: the first block of a prompt, or the first block of a piece whose
  upper part was evicted here. Such a piece is joined to its upper part when that comes back. `depth` counts from the
  root, so a block that is found with the depth at which the prompt has it has all the blocks above it in the table.
- Order of use: using a prompt uses every block of it, but only the deepest is moved. A node with children is taken
  out of the list when its turn comes, and gets the place of its last child when that leaves. What leaves is therefore
  the least recently used block that has none below it, exactly as if every block had been moved, deepest first.
- A node that nobody holds is released as soon as it has no children.

Indices and not references, `NONE` for nothing. The functions trust their callers; nothing is checked for bounds.
"""

# mypy: disable-error-code="untyped-decorator,no-any-return,assignment,arg-type,return-value"

from typing import Any

import numpy as np

from core.compiled import compiled, inner
from router.index.layout import (
    ADOPTED,
    COUNT,
    DEAD,
    DYING,
    FREE,
    FREED,
    LISTED,
    NEWEST,
    NOBODY,
    NONE,
    OLDEST,
    REFS,
    UNLISTED,
    USED,
)


@inner
def find(nodes: Any, buckets: Any, key0: Any, key1: Any) -> int:
    n = buckets[key0 & np.uint64(buckets.shape[0] - 1)]
    while n != NONE and (nodes[n].key0 != key0 or nodes[n].key1 != key1):
        n = nodes[n].chain
    return np.int64(n)  # node numbers are passed as int64, constants too: another type is another compilation


@compiled
def find_all(nodes: Any, buckets: Any, keys: Any, out: Any) -> None:
    for i in range(keys.shape[0]):
        out[i] = find(nodes, buckets, keys[i, 0], keys[i, 1])


@inner
def set_holders(nodes: Any, head: Any, sets: Any, n: int, new: int) -> None:
    old = nodes[n].holders
    sets[new, REFS] += 1
    sets[old, REFS] -= 1
    if sets[old, REFS] == 0 and sets[old, LISTED] == 0:
        sets[old, LISTED] = 1
        sets[head[DYING], DEAD] = old
        head[DYING] += 1
    nodes[n].holders = new


@inner
def _unlist(nodes: Any, head: Any, n: int) -> None:
    older, newer = nodes[n].older, nodes[n].newer
    if older == NONE:
        head[OLDEST] = newer
    else:
        nodes[older].newer = newer
    if newer == NONE:
        head[NEWEST] = older
    else:
        nodes[newer].older = older
    nodes[n].older = UNLISTED


@inner
def touch(nodes: Any, head: Any, n: int) -> None:
    """Use a node now, and with it all above it."""
    if head[NEWEST] == n:
        return
    if nodes[n].older != UNLISTED:
        _unlist(nodes, head, n)
    newest = head[NEWEST]
    nodes[n].older = newest
    nodes[n].newer = NONE
    if newest == NONE:
        head[OLDEST] = n
    else:
        nodes[newest].newer = n
    head[NEWEST] = n


@inner
def _inherit(nodes: Any, head: Any, n: int, heir: int) -> None:
    """Give the place of `n` in the order of use to `heir`, which has none."""
    older, newer = nodes[n].older, nodes[n].newer
    nodes[heir].older = older
    nodes[heir].newer = newer
    if older == NONE:
        head[OLDEST] = heir
    else:
        nodes[older].newer = heir
    if newer == NONE:
        head[NEWEST] = heir
    else:
        nodes[newer].older = heir
    nodes[n].older = UNLISTED


@inner
def _join(nodes: Any, n: int, parent: int) -> None:
    nodes[n].parent = parent
    nodes[n].prev = NONE
    nodes[n].next = NONE
    if parent == NONE:
        return
    first = nodes[parent].child
    nodes[n].next = first
    if first != NONE:
        nodes[first].prev = n
    nodes[parent].child = n


@inner
def _part(nodes: Any, n: int) -> None:
    before, after = nodes[n].prev, nodes[n].next
    if before != NONE:
        nodes[before].next = after
    elif nodes[n].parent != NONE:
        nodes[nodes[n].parent].child = after
    if after != NONE:
        nodes[after].prev = before


@inner
def release(nodes: Any, buckets: Any, head: Any, sets: Any, n: int, kept: int) -> None:
    """Free a node without children, and those above it that nobody holds and that have no others, but not `kept`."""
    while True:
        parent = np.int64(nodes[n].parent)
        _part(nodes, n)
        bucket = nodes[n].key0 & np.uint64(buckets.shape[0] - 1)
        if buckets[bucket] == n:
            buckets[bucket] = nodes[n].chain
        else:
            before = buckets[bucket]
            while nodes[before].chain != n:
                before = nodes[before].chain
            nodes[before].chain = nodes[n].chain
        is_bare = parent != NONE and nodes[parent].child == NONE
        if is_bare and nodes[parent].older == UNLISTED:
            _inherit(nodes, head, n, parent)
        else:
            _unlist(nodes, head, n)
        set_holders(nodes, head, sets, n, np.int64(NOBODY))
        sets[NOBODY, REFS] -= 1
        nodes[n].holders = FREED
        nodes[n].chain = head[FREE]
        head[FREE] = n
        head[COUNT] -= 1
        if not is_bare or nodes[parent].holders != NOBODY or parent == kept:
            return
        n = parent


@compiled
def evict(nodes: Any, buckets: Any, head: Any, sets: Any, count: int, kept: int) -> None:
    """Let the least recently used blocks go until `count` nodes are free, or none is in use.

    `kept` stays although nobody may hold it: a chain is about to be put below it, and it was used last.
    """
    while nodes.shape[0] - head[COUNT] < count and head[OLDEST] != NONE:
        n = head[OLDEST]
        if nodes[n].child != NONE:
            _unlist(nodes, head, n)
        else:
            release(nodes, buckets, head, sets, n, kept)


@inner
def _add(nodes: Any, buckets: Any, head: Any, sets: Any, key0: Any, key1: Any, parent: int) -> int:
    n = head[FREE]
    if n != NONE:
        head[FREE] = nodes[n].chain
    else:
        n = head[USED]
        head[USED] += 1
    head[COUNT] += 1
    bucket = key0 & np.uint64(buckets.shape[0] - 1)
    nodes[n].key0 = key0
    nodes[n].key1 = key1
    nodes[n].chain = buckets[bucket]
    buckets[bucket] = n
    nodes[n].child = NONE
    nodes[n].holders = NOBODY
    sets[NOBODY, REFS] += 1
    nodes[n].depth = 0 if parent == NONE else nodes[parent].depth + 1
    nodes[n].older = UNLISTED
    _join(nodes, n, parent)
    return n


@inner
def _adopt(nodes: Any, n: int, parent: int) -> bool:
    """Join a root and all below it to `parent`. Returns False, changing nothing, if `parent` is itself below it."""
    above = parent
    while above != NONE:
        if above == n:
            return False
        above = nodes[above].parent
    grown = nodes[parent].depth + 1 - nodes[n].depth
    at = n
    while True:
        nodes[at].depth += grown
        if nodes[at].child != NONE:
            at = nodes[at].child
            continue
        while at != n and nodes[at].next == NONE:
            at = nodes[at].parent
        if at == n:
            break
        at = nodes[at].next
    _join(nodes, n, parent)
    return True


@inner
def _reach(nodes: Any, buckets: Any, keys: Any, base: int) -> int:
    """Return how many leading keys are in the table, one below the other, the first at depth `base`. Bisects."""
    low, high = 0, keys.shape[0]
    while low < high:
        middle = (low + high) // 2
        n = find(nodes, buckets, keys[middle, 0], keys[middle, 1])
        if n != NONE and nodes[n].depth == base + middle:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def thread(nodes: Any, buckets: Any, head: Any, sets: Any, keys: Any, parent: int) -> int:
    """Put a chain of blocks below `parent` into the table and use it. Returns its deepest node, or NONE.

    Makes room by evicting others. A chain that is longer than the table, or that contradicts what is known of its
    blocks (a worker that does not chain its hashes), is cut short. Stops at a root that it joins to the block above,
    and leaves it in `head[ADOPTED]`: the caller lets the blocks above have its holders, then calls again.
    """
    head[ADOPTED] = NONE
    first = find(nodes, buckets, keys[0, 0], keys[0, 1])
    base = 0
    if parent != NONE:
        base = nodes[parent].depth + 1
    elif first != NONE:
        base = nodes[first].depth
    known = _reach(nodes, buckets, keys, base)
    n = parent if known == 0 else find(nodes, buckets, keys[known - 1, 0], keys[known - 1, 1])
    above = 0
    if n != NONE:
        touch(nodes, head, n)
        above = nodes[n].depth + 1
    stop = min(keys.shape[0], known + nodes.shape[0] - above)
    evict(nodes, buckets, head, sets, stop - known, n)
    for i in range(known, stop):
        found = find(nodes, buckets, keys[i, 0], keys[i, 1])
        if found == NONE:
            found = _add(nodes, buckets, head, sets, keys[i, 0], keys[i, 1], n)
        elif nodes[found].parent != n:
            if n != NONE and nodes[found].parent == NONE and _adopt(nodes, found, n):
                head[ADOPTED] = found
                n = found
            break
        n = found
    if n != NONE:
        touch(nodes, head, n)
    return n


@compiled
def match(nodes: Any, buckets: Any, head: Any, keys: Any, runs: Any) -> int:
    """Write (depth, holders) of each run of blocks with the same holders into `runs[R, 2]`, use the deepest block.

    Returns the number of runs. Gallops, then bisects: holders only get fewer along a chain, so where they are the
    same at two depths they are the same between.
    """
    num_runs = 0
    start = 0
    deepest = NONE
    total = keys.shape[0]
    while start < total:
        n = find(nodes, buckets, keys[start, 0], keys[start, 1])
        if n == NONE or nodes[n].depth != start:
            break
        holders = nodes[n].holders
        deepest = n
        low, step = start + 1, 1  # all before `low` are of this run
        high = total
        while low < high:
            middle = min(low + step - 1, (low + high) // 2) if step else (low + high) // 2
            n = find(nodes, buckets, keys[middle, 0], keys[middle, 1])
            if n != NONE and nodes[n].depth == middle and nodes[n].holders == holders:
                deepest = n
                low = middle + 1
                step *= 2
            else:
                high = middle
                step = 0
        runs[num_runs, 0] = low
        runs[num_runs, 1] = holders
        num_runs += 1
        start = low
    if deepest != NONE:
        touch(nodes, head, deepest)
    return num_runs
