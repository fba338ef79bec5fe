"""What the index says about one prompt: how many of its leading blocks each worker holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.ids import WorkerId
from core.kv_events import Tier
from router.index.slots import WorkerSlots


class Run(NamedTuple):
    """The same workers hold the first `depth` blocks. Bits are the index's own, see `PrefixMatch.slot_of_bit`."""

    depth: int
    device: int  # bitset of those that have them on the device, or will once what is under way has been computed
    anywhere: int  # and of those that have them in any tier

    def of(self, tier: Tier) -> int:
        return self.device if tier is Tier.DEVICE else self.anywhere


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """One answer, valid until the index or the slots change.

    Attributes:
        runs: shallowest first; depths grow, and the sets of a deeper run are within those of a shallower one.
        slot_of_bit: int64, slot of each of the index's bits.
        hot_blocks: leading blocks that a good part of all recent prompts share.
        hot_reuses: how many prompts with those blocks are expected in the time that a block stays cached, whichever
            worker they go to.
    """

    runs: Sequence[Run]
    slot_of_bit: NDArray[np.int64]
    slots: WorkerSlots
    hot_blocks: int = 0
    hot_reuses: float = 0.0

    def blocks(self, tier: Tier, num_slots: int) -> NDArray[np.int32]:  # [num_slots]
        """Return how many leading blocks each slot's worker holds. The array is the caller's.

        Args:
            tier: DEVICE counts blocks that can be used at once; HOST those that are held in any tier, so it is
                nowhere less.
            num_slots: length of the result; at least `slots.capacity`.
        """
        found = np.zeros(num_slots, dtype=np.int32)
        runs = [run for run in self.runs if run.of(tier)]
        if len(runs) == 1:
            mask = runs[0].of(tier)
            held = _bits(mask.to_bytes((mask.bit_length() + 7) // 8, "little"))
            found[self.slot_of_bit[held.nonzero()[0]]] = runs[0].depth
        elif runs:
            # The sets are nested, so a worker's depth follows from the number of runs that it is in.
            width = (runs[0].of(tier).bit_length() + 7) // 8
            packed = b"".join(run.of(tier).to_bytes(width, "little") for run in runs)
            counts = _bits(packed).reshape(-1, 8 * width).sum(axis=0, dtype=np.uint16)
            holders = np.flatnonzero(counts)
            depths = np.array([0, *(run.depth for run in runs)], dtype=np.int32)
            found[self.slot_of_bit[holders]] = depths[counts[holders]]
        return found

    def holders(self, tier: Tier = Tier.DEVICE) -> Mapping[WorkerId, int]:
        """Return the same by worker; those that hold nothing are absent."""
        blocks = self.blocks(tier, self.slots.capacity)
        found = {}
        for slot in np.flatnonzero(blocks):
            worker_id = self.slots.worker(int(slot))
            if worker_id is not None:
                found[worker_id] = int(blocks[slot])
        return found


def _bits(packed: bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
