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

    def due(self, now: float) -> list[tuple[int, NDArray[np.int32]]]:
        """Take out what lapses by `now`: (tick, nodes in the order in which they came)."""
        found = []
        for tick in sorted(self._spokes):
            if tick * self._tick_s > now:
                break
            arrays = self._spokes.pop(tick)
            self._num_bytes -= sum(map(_size, arrays))
            found.append((tick, np.concatenate(arrays)))
        return found


def _size(nodes: NDArray[np.int32]) -> int:
    return nodes.nbytes + 120  # and the array object
