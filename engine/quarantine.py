"""Blocks of requests that have ended while another thread still copies from or to them. Engine thread only."""

from collections.abc import Collection

from engine.blocks import Owner
from engine.handoff import HandoffTable
from engine.ledger import KvLedger
from engine.sequence import TokenSequence


class Quarantine:
    """Ends holds; keeps what is still being copied until the last copy has ended."""

    def __init__(self, ledger: KvLedger, handoffs: HandoffTable) -> None:
        self._ledger = ledger
        self._handoffs = handoffs
        self._kept: dict[object, TokenSequence] = {}

    @property
    def sequences(self) -> Collection[TokenSequence]:
        """Those that still own blocks here."""
        return self._kept.values()

    def release(self, sequence: TokenSequence) -> None:
        """End the hold of a request, if it has one, and take its blocks back: now, or when `collect` finds it drained.

        The sequence's state is still the one before its end.
        """
        pinned = self._handoffs.close(sequence.request_id)
        if pinned is None:
            self._ledger.release(sequence)
        else:
            self._ledger.change_owner(sequence, Owner.QUARANTINE)
            self._kept[pinned] = sequence

    def collect(self) -> None:
        """Take back what is not copied any more."""
        for pinned in self._handoffs.take_drained():
            self._ledger.release(self._kept.pop(pinned), Owner.QUARANTINE)
