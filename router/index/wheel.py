"""The timing wheel of predicted blocks: which nodes were promised something that lapses at which tick.

A node that has meanwhile been freed, or given to another block, does no harm: the rewriting takes what lapses at this
tick from whatever is there, and whatever lapses at this tick has to go.
"""

import math

import numpy as np
from numpy.typing import NDArray


class PredictionWheel:
    """Nodes by tick."""

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._spokes: dict[int, list[NDArray[np.int32]]] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def tick(self, at: float) -> int:
        """Return the first tick that is not before `at`."""
        return math.ceil(at / self._tick_s)

    def add(self, tick: int, nodes: NDArray[np.int32]) -> None:
        """Keep these nodes until `tick`. The array becomes the wheel's."""
        self._spokes.setdefault(tick, []).append(nodes)
        self._num_bytes += _size(nodes)

    def nodes(self) -> NDArray[np.int32]:
        """Return all that it keeps, some of them more than once."""
        kept = [nodes for spoke in self._spokes.values() for nodes in spoke]
        return np.concatenate(kept) if kept else np.empty(0, dtype=np.int32)

    def due(self, now: float, max_nodes: int) -> list[tuple[int, NDArray[np.int32]]]:
        """Take out what lapses by `now`, soonest first, a prediction at a time until there are `max_nodes` or more.

        Returns:
            Tick and nodes of each prediction; what is left comes the next time.
        """
        found = []
        while self._spokes and max_nodes > 0:
            tick = min(self._spokes)
            if tick * self._tick_s > now:
                break
            spoke = self._spokes[tick]
            while spoke and max_nodes > 0:
                nodes = spoke.pop()
                found.append((tick, nodes))
                max_nodes -= len(nodes)
                self._num_bytes -= _size(nodes)
            if not spoke:
                del self._spokes[tick]
        return found


def _size(nodes: NDArray[np.int32]) -> int:
    return nodes.nbytes + 120  # and the array object
