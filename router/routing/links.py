"""What is known of the links between workers: goodput and round trip per pair, compression and overlap per class.

A pair's own figures fade into those of its class (same host, rack, zone, or far apart) while nothing crosses it, so
that one bad minute does not cut a pair off for good. The table of pairs is open-addressed and bounded: a new pair takes
the place of the one that was used longest ago among the few that it may stand in.
"""

import math

import numpy as np

from router.routing.columns import LINK, LINK_CLASS, LINK_CLASSES
from router.routing.config import LinkPriors
from router.routing.table import WorkerTable
from router.routing.topology import floor_class, link_class
from router.routing.transfer import LINK_MIX, LINK_PROBES, LINK_STRIDE

_WEIGHT = 0.2  # of the newest observation
_LEAST_BYTES = 4096  # of a transfer that tells about bandwidth
_LEAST_S = 1e-4  # times below are noise
_LEAST_RESIDUAL, _MOST_RESIDUAL = 0.05, 20.0


class LinkModel:
    """Concurrency: one thread.

    Attributes:
        pairs: structured array (`columns.LINK`), open-addressed.
        classes: structured array (`columns.LINK_CLASS`) by `LinkClass`.
        bounds: what no link is better than: (raw bytes/s, round trip, residual).
    """

    def __init__(self, config: LinkPriors, table: WorkerTable) -> None:
        self._table = table
        self.pairs = np.zeros(1 << math.ceil(math.log2(config.max_learned)), LINK)
        self.classes = np.zeros(LINK_CLASSES, LINK_CLASS)
        self.classes["goodput"] = (
            config.same_host_bytes_per_s,
            config.same_rack_bytes_per_s,
            config.same_zone_bytes_per_s,
            config.far_bytes_per_s,
        )
        self.classes["rtt_s"] = (
            config.same_host_rtt_s,
            config.same_rack_rtt_s,
            config.same_zone_rtt_s,
            config.far_rtt_s,
        )
        self.classes["residual"] = 1.0
        self.classes["ratio"] = 1.0
        self._best_goodput = float(self.classes["goodput"].max())
        self._least_rtt_s = float(self.classes["rtt_s"].min())
        self.bounds = self._bounds()
        table.on_reset.append(self._forget)

    def observe(
        self, prefill: int, decode: int, goodput: float | None, rtt_s: float | None, queued_bytes: int, now: float
    ) -> None:
        """Learn from what the sending worker measured between two slots."""
        near = self.classes[self._class(prefill, decode)]
        at = self._place(prefill, decode, near, now)
        link = self.pairs[at]
        if goodput is not None and 0.0 < goodput < math.inf:
            link["goodput"] += _WEIGHT * (goodput - link["goodput"])
            near["goodput"] += _WEIGHT * (goodput - near["goodput"])
            self._best_goodput = max(self._best_goodput, goodput)
        if rtt_s is not None and 0.0 <= rtt_s < math.inf:
            link["rtt_s"] += _WEIGHT * (rtt_s - link["rtt_s"])
            near["rtt_s"] += _WEIGHT * (rtt_s - near["rtt_s"])
            self._least_rtt_s = min(self._least_rtt_s, rtt_s)
        self.bounds = self._bounds()
        link["queued_bytes"] = queued_bytes
        link["seen_at"] = now

    def observe_transfer(
        self,
        prefill: int,
        decode: int,
        *,
        quality_floor: float,
        kv_bytes: int,
        wire_bytes: int,
        exposed_s: float,
        predicted_s: float | None,
    ) -> None:
        """Learn how well KV was compressed, and how much of the transfer the prefill hid."""
        if kv_bytes < _LEAST_BYTES:
            return
        near, floor = self.classes[self._class(prefill, decode)], floor_class(quality_floor)
        if wire_bytes > 0:
            near["ratio"][floor] += _WEIGHT * (kv_bytes / wire_bytes - near["ratio"][floor])
        if predicted_s is not None and predicted_s > _LEAST_S and 0.0 <= exposed_s < math.inf:
            off = max(_LEAST_S, exposed_s) / predicted_s
            residual = near["residual"][floor] * min(10.0, max(0.1, off)) ** _WEIGHT
            near["residual"][floor] = min(_MOST_RESIDUAL, max(_LEAST_RESIDUAL, residual))
        self.bounds = self._bounds()

    def _bounds(self) -> tuple[float, float, float]:
        ratio = float(self.classes["ratio"].max())
        return self._best_goodput * ratio, self._least_rtt_s, float(self.classes["residual"].min())

    def _class(self, one: int, other: int) -> int:
        a, b = self._table.rows[one], self._table.rows[other]
        return link_class((a["host"], a["rack"], a["zone"]), (b["host"], b["rack"], b["zone"]))

    def _place(self, prefill: int, decode: int, near: np.void, now: float) -> int:
        key = prefill * LINK_STRIDE + decode + 1
        first = (key * LINK_MIX) % len(self.pairs)
        places = [(first + probe) % len(self.pairs) for probe in range(LINK_PROBES)]
        for at in places:
            if self.pairs[at]["key"] == key:
                return at
        oldest = min(places, key=lambda at: self.pairs[at]["seen_at"] if self.pairs[at]["key"] else -math.inf)
        self.pairs[oldest] = (key, near["goodput"], near["rtt_s"], 0.0, now)
        return oldest

    def _forget(self, slot: int) -> None:
        """Another incarnation may be on another machine."""
        pairs = self.pairs["key"] - 1
        gone = (self.pairs["key"] > 0) & ((pairs // LINK_STRIDE == slot) | (pairs % LINK_STRIDE == slot))
        self.pairs["key"][gone] = 0
