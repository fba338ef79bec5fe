"""Keeps one worker's part of the prefix index in step with its KV event batches.

Batches carry (epoch, sequence), consecutive from 1. Life of a feed:
1. FOLLOWING: the next batch in sequence is applied; one seen before is skipped; one of an older epoch is skipped.
2. A gap, or a first batch that is not number 1, makes it LOST: nothing is applied, the reader leaves the batch unread
   and asks the worker for a snapshot.
3. The snapshot replaces all that was known, and the feed follows from the snapshot's sequence number. It says nothing
   of prompts that are on their way, nor of those that landed since it was taken: predictions outlive it.
A newer epoch starts from an empty cache."""

from collections.abc import Sequence
from enum import StrEnum

from core.ids import Epoch, WorkerId
from core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEventBatch
from router.index.prefix_index import PrefixIndex


class FeedResult(StrEnum):
    APPLIED = "applied"
    SKIPPED = "skipped"  # seen before, or of a dead incarnation
    GAP = "gap"  # not applied: read it again after `resynchronise`


class KvFeed:
    """The feed of one worker."""

    def __init__(self, worker_id: WorkerId, epoch: Epoch, index: PrefixIndex) -> None:
        self._worker_id = worker_id
        self._index = index
        self.epoch = epoch
        self.sequence = 0
        self.is_lost = False

    def restart(self, epoch: Epoch) -> None:
        """A new incarnation: empty cache, numbers from 1."""
        self._index.forget(self._worker_id)
        self.epoch = epoch
        self.sequence = 0
        self.is_lost = False

    def apply(self, batch: KvEventBatch) -> FeedResult:
        """Take the next batch of the stream.

        Raises:
            ProtocolError: it holds what is no hash; events before that one are applied, the batch is not counted.
        """
        if batch.epoch < self.epoch:
            return FeedResult.SKIPPED
        if batch.epoch > self.epoch:
            self.restart(batch.epoch)
        if batch.sequence <= self.sequence:
            return FeedResult.SKIPPED
        if batch.sequence > self.sequence + 1 or self.is_lost:
            self.is_lost = True
            return FeedResult.GAP
        for event in batch.events:
            match event:
                case BlocksStored(parent, hashes, tier):
                    self._index.store(self._worker_id, hashes, tier, parent=parent)
                case BlocksRemoved(hashes, tier):
                    self._index.remove(self._worker_id, hashes, tier)
                case CacheCleared():
                    self._index.forget(self._worker_id)
        self.sequence = batch.sequence
        return FeedResult.APPLIED

    def resynchronise(self, epoch: Epoch, sequence: int, chains: Sequence[BlocksStored]) -> bool:
        """Replace what is held by a snapshot. Returns False, changing nothing, if it is of an older epoch or state.

        Raises:
            ProtocolError: it holds what is no hash; the feed is lost.
        """
        if (epoch, sequence) < (self.epoch, self.sequence):
            return False
        if epoch > self.epoch:
            self.restart(epoch)
        self.sequence = 0
        self.is_lost = True  # until all of it is stored
        self._index.replace(self._worker_id, chains)
        self.sequence = sequence
        self.is_lost = False
        return True
