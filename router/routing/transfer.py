"""What sending KV from one worker to another takes, read from the tables of `router.routing.links`. Compiled. Pure."""

from typing import Any

import numpy as np

from core.compiled import inner

LINK_STRIDE = 1 << 20  # more slots than a cluster has: the key of a pair does not depend on the size of the table
LINK_PROBES = 8
LINK_MIX = 0x9E3779B1  # spreads the keys of pairs over the table


@inner
def class_of(one: Any, other: Any) -> Any:
    """Return the `LinkClass` of two workers; places that nobody told are far apart."""
    if one.host != 0 and one.host == other.host:
        return 0
    if one.rack != 0 and one.rack == other.rack:
        return 1
    if one.zone != 0 and one.zone == other.zone:
        return 2
    return 3


@inner
def link_at(links: Any, prefill: int, decode: int) -> Any:
    """Return where the pair's own link is in the open-addressed table, or -1."""
    key = prefill * LINK_STRIDE + decode + 1
    size = links.shape[0]
    at = (key * LINK_MIX) % size
    for _ in range(LINK_PROBES):
        if links[at].key == key:
            return at
        at = (at + 1) % size
    return -1


@inner
def transfer_seconds(
    rows: Any, links: Any, classes: Any, p: int, d: int, raw_bytes: float, hidden_s: float, q: Any, s: Any
) -> tuple[float, float]:
    """Return the (exposed, whole) seconds of sending KV from p to d, of which `hidden_s` can pass meanwhile."""
    floor = q.floor
    near = classes[class_of(rows[p], rows[d])]
    goodput, rtt_s, queued = near.goodput, near.rtt_s, 0.0
    at = link_at(links, p, d)
    if at >= 0:
        link = links[at]
        age_s = max(0.0, q.now - link.seen_at)
        own = np.exp(-age_s / s.link_forget_s)
        goodput += own * (link.goodput - goodput)
        rtt_s += own * (link.rtt_s - rtt_s)
        queued = max(0.0, link.queued_bytes - age_s * goodput)
    wire = raw_bytes / near.ratio[floor]
    whole_s = rtt_s + (queued + wire) / goodput
    tail_s = rtt_s + s.tail_ratio * wire / goodput
    return max(tail_s, whole_s - hidden_s) * near.residual[floor], whole_s
