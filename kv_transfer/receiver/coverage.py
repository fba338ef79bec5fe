"""Which part of a box has arrived, and which has been written: exactly once, exactly all of it.

A frame is claimed when it has been verified, before it is decoded: what comes twice is refused then. Claims never
overlap, so both kinds of completeness are sums of volumes. Overlap is found per (layers, heads) slab, of which a
transfer has few (its layer groups times its shards); inside a slab token ranges are merged as they meet.
"""

from bisect import bisect_left

from kv_transfer.box import Box


class Coverage:
    """Accounts for the boxes inside `target`. Not thread-safe: claims are made by one thread."""

    def __init__(self, target: Box | None) -> None:
        """Start with nothing claimed. `target` None means that there is nothing to write."""
        self.target = target
        self._slabs: dict[tuple[range, range], list[tuple[int, int]]] = {}

    @property
    def volume(self) -> int:
        """Cells of the target."""
        return 0 if self.target is None else self.target.volume

    def is_inside(self, box: Box) -> bool:
        """Return whether the target holds all of `box`. Pure."""
        return self.target is not None and self.target.contains(box)

    def overlaps(self, box: Box) -> bool:
        """Return whether some cell of `box` has been claimed before. Pure."""
        return any(
            _meet(layers, box.layers) and _meet(heads, box.heads) and _overlaps(spans, box.tokens)
            for (layers, heads), spans in self._slabs.items()
        )

    def claim(self, box: Box) -> None:
        """Account for a box that is inside the target and overlaps nothing (asserted)."""
        assert self.is_inside(box)
        assert not self.overlaps(box)
        spans = self._slabs.setdefault((box.layers, box.heads), [])
        start, stop = box.tokens.start, box.tokens.stop
        at = bisect_left(spans, (start, stop))
        if at < len(spans) and spans[at][0] == stop:
            stop = spans.pop(at)[1]
        if at > 0 and spans[at - 1][1] == start:
            start = spans.pop(at - 1)[0]
            at -= 1
        spans.insert(at, (start, stop))


def _meet(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _overlaps(spans: list[tuple[int, int]], tokens: range) -> bool:
    at = bisect_left(spans, (tokens.start, tokens.start))
    return (at < len(spans) and spans[at][0] < tokens.stop) or (at > 0 and spans[at - 1][1] > tokens.start)
