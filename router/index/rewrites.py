"""Changes of many blocks' holders at once, compiled: up a chain, down a subtree, along a list.

A rewriting has a number `op` and says for each set of holders what it becomes. Sets are made in Python
(`router.index.holders`), so a function that meets one whose outcome is not noted yet returns the node where it
stands; the caller notes the outcome and calls again from there. Chains share sets, so that is once or twice in a walk
over any number of blocks.
"""

# mypy: disable-error-code="untyped-decorator,no-any-return,assignment,arg-type,return-value"

from typing import Any

import numpy as np

from core.compiled import compiled
from router.index.layout import BARE, FREED, LOSS, NOBODY, NONE, OP, TARGET
from router.index.table import release, set_holders


@compiled
def climb(nodes: Any, head: Any, sets: Any, op: int, n: int, changed: Any, num_changed: int) -> tuple[int, int]:
    """Rewrite from `n` towards the root, up to the first node that stays as it is.

    Returns:
        The node that is stuck, or NONE; and the length of `changed`, the nodes that were rewritten, deepest first.
    """
    while n != NONE:
        old = nodes[n].holders
        if sets[old, OP] != op:
            return n, num_changed
        new = np.int64(sets[old, TARGET])
        if new == old:
            break
        set_holders(nodes, head, sets, n, new)
        changed[num_changed] = n
        num_changed += 1
        n = np.int64(nodes[n].parent)
    return NONE, num_changed


@compiled
def cut(nodes: Any, buckets: Any, head: Any, sets: Any, op: int, top: int, n: int, is_deep: bool) -> int:
    """Rewrite `top` and what is below it, and release what nobody holds any more. Resumes at `n`.

    Below a block that its worker holds nowhere any more (`LOSS`, noted with the outcome), rewriting `op + 1`
    takes over: what is there cannot be used either. Elsewhere it goes on below a node only if that changed, and not
    even then unless `is_deep`.
    """
    while n != NONE:
        old = nodes[n].holders
        bare = head[BARE]
        wanted = op if bare == NONE else op + 1
        if sets[old, OP] != wanted:
            return n
        new = np.int64(sets[old, TARGET])
        below = np.int64(NONE)
        if new != old:
            set_holders(nodes, head, sets, n, new)
            if bare == NONE and sets[old, LOSS]:
                head[BARE] = n
                bare = n
            if is_deep or bare != NONE:
                below = np.int64(nodes[n].child)
        done = n
        if below != NONE:
            n = below
        else:
            while True:
                if n == head[BARE]:
                    head[BARE] = NONE
                if n == top or nodes[n].next != NONE:
                    break
                n = np.int64(nodes[n].parent)
            n = np.int64(NONE if n == top else nodes[n].next)
        if nodes[done].holders == NOBODY and nodes[done].child == NONE:
            release(nodes, buckets, head, sets, done, np.int64(NONE))
    return NONE


@compiled
def rewrite(nodes: Any, buckets: Any, head: Any, sets: Any, op: int, listed: Any, start: int) -> int:
    """Rewrite the nodes of a list, and release what nobody holds any more.

    Returns:
        The position in the list where it is stuck; its length when it is through.
    """
    for i in range(start, listed.shape[0]):
        n = np.int64(listed[i])
        old = nodes[n].holders
        if old == FREED:
            continue
        if sets[old, OP] != op:
            return i
        new = np.int64(sets[old, TARGET])
        if new == old:
            continue
        set_holders(nodes, head, sets, n, new)
        if new == NOBODY and nodes[n].child == NONE:
            release(nodes, buckets, head, sets, n, np.int64(NONE))
    return listed.shape[0]


@compiled
def ancestry(nodes: Any, n: int, out: Any) -> int:
    """Write `n` and those above it into `out`, as many as it takes. Returns the node above the last, or NONE."""
    for i in range(out.shape[0]):
        out[i] = n
        n = np.int64(nodes[n].parent)
    return n
