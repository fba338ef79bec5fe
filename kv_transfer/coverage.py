"""Which part of a box has been written: exactly once, exactly all of it.

Boxes that are written never overlap, so completeness is a sum of volumes. Overlap is found per (layers, heads) slab,
of which a transfer has few (its layer groups times its shards); inside a slab token ranges are merged as they meet.
"""

from bisect import bisect_left

from kv_transfer.box import Box


class Coverage:
    """Accounts for the boxes written inside `target`. Not thread-safe."""

    def __init__(self, target: Box | None) -> None:
        """Start with nothing written. `target` None means that there is nothing to write."""
        self._target = target
        self._missing = 0 if target is None else target.volume
        self._slabs: dict[tuple[range, range], list[tuple[int, int]]] = {}

    @property
    def is_complete(self) -> bool:
        return self._missing == 0

    def is_inside(self, box: Box) -> bool:
        """Return whether the target holds all of `box`. Pure."""
        return self._target is not None and self._target.contains(box)

    def overlaps(self, box: Box) -> bool:
        """Return whether some cell of `box` has been added before. Pure."""
        return any(
            _meet(layers, box.layers) and _meet(heads, box.heads) and _overlaps(spans, box.tokens)
            for (layers, heads), spans in self._slabs.items()
        )

    def add(self, box: Box) -> None:
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
        self._missing -= box.volume


def _meet(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _overlaps(spans: list[tuple[int, int]], tokens: range) -> bool:
    at = bisect_left(spans, (tokens.start, tokens.start))
    return (at < len(spans) and spans[at][0] < tokens.stop) or (at > 0 and spans[at - 1][1] > tokens.start)
